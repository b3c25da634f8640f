//! What the agent's machine asks the target, over the agent's certificate:
//! whether a group's name is free, whether a tag is.
