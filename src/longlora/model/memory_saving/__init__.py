"""What trades time, the host's memory or precision for a device's memory; each switch of `MemorySettings` a file."""
