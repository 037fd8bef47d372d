"""Long question-answer pairs: documents cut into sections, asked about, answered by a teacher, checked."""
