"""Users' C, compiled by BCC, in front of and behind the balancer."""
