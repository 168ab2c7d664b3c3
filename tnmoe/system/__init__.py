"""The operating system: files, folders, locks, memory, terminals."""
