"""Values <-> text: JSON documents, lb.toml, tables, Prometheus, RFC 9457 problems, captures."""
