"""pcap records and their metadata as bytes; counts; merging."""
