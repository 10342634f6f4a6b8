"""Status after status -> rates -> the screen."""
