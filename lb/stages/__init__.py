"""Users' C programs, compiled by BCC, before and after the balancer."""
