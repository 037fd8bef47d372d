"""The paper's tables and our own studies, run cell by cell at a size anyone can afford."""
