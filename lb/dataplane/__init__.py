"""The balancer's programs and maps."""
