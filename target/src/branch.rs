//! Writes on top of a view: the log of one drill.
