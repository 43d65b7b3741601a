"""Parts shared by several model families. Every one of them works on packed sequences, never on padding."""
