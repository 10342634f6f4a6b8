"""In the daemon: the threads that own the balancer and its features, events, metrics of its own."""
