//! The directory of KV blocks in the world: both machines of [`cache::directory`] on every node, pools
//! that fill and forget, and members that each node learns late and sometimes wrongly.

mod measure;
mod node;
mod pool;
mod scenario;

pub use measure::{Rates, Traffic, traffic};
pub use node::{Command, DirectoryNode, NodeSetup, Sabotage};
pub use pool::{Pool, Texts};
pub use scenario::{Counts, Outcome, Plan, SETTLED_WITHIN_S};
