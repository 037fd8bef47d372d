"""`longlora report`: one page of one run, or of several models side by side."""
