//! The shells of a node: HTTP in front, a thread for each model behind.
//!
//! Owns sockets, threads, files, clocks and signals. Refuses decisions: it turns bytes and timers into
//! inputs of the pure parts and their outputs back into bytes.
//!
//! [`serve`] starts a node; the CLI and the tests use nothing else.

mod accept;
pub mod http;
mod ids;
mod kv;
pub mod load;
pub mod measured;
pub mod mesh;
pub mod metrics;
mod model;
mod node;
mod options;
mod paced;
mod registry;
pub mod replica;
mod write_deadline;

pub use http::{ADMIN_KEY_VARIABLE, ApiKeys, ApiKeysError};
pub use load::{LoadProgress, Loaded, Loader, OnProgress};
pub use node::{LoadFailed, Node, ServeError, serve, shutdown_signal};
pub use options::{HttpLimits, ModelOptions, NodeOptions};
