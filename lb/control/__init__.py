"""The use cases: a request -> desired state -> store and dataplane."""
