"""From a teacher alone to a deployable student: widths, repair, training, and the student as source code."""
