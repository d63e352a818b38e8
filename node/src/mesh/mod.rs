//! The shells between nodes. Each plane lives in one module behind a seam.

pub mod overlay;
