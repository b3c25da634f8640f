//! Steps 7 and 8 of the walk of one write: from the journal to the target.

pub mod frame;
pub mod identity;
pub mod token;
pub mod wire;
