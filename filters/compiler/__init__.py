"""Text -> libpcap -> classic BPF -> a graph -> passes -> eBPF."""
