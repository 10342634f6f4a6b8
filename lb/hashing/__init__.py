"""How a flow finds its backend: the Maglev table, slot words, the flow hash. Loops over tables are C, in native/."""
