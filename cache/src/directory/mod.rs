//! Which node has which KV blocks: hints for the router, and for whom to ask before computing a prefix.
//!
//! Two machines. The [`Reporter`] of a node says to the owners of each model what its replica has stored
//! and removed; the [`Owner`] of a node is told by all who report to it, and answers who has the longest
//! beginning of a prompt. Their messages are in [`protocol::directory`], the whole story in
//! docs/kv-directory.md.
//!
//! ```text
//! pool's owner ─► Stored, Removed ─► Reporter ─► Tell ─► RPC ─► Owner::told
//!                                              ◄─ Answered ◄─ RPC ◄─ Heard
//! router ─► RPC to an owner, or here ─► Owner::query ─► Found
//! ```
//!
//! Class **local**: each node writes what it has, and it is dropped with its membership. There is no log
//! and no merge. What a message leaves behind depends on nothing but the answer to it:
//!
//! - *Events are numbered.* The owner says which one it needs next; the reporter goes on from there as
//!   long as it has kept them, and else says all it has, piece by piece.
//! - *A piece is true at one event.* It says everything between two names after that event, so that events
//!   and pieces may follow each other in any mixture, and either may come twice.
//! - *An epoch is one life of a replica.* A word of another life is not understood, and all is said again.
//! - *Sums are compared.* Where both sides have made the same steps and hold different sets, one of them is
//!   at fault; it is counted, and all is said again.

mod index;
mod owner;
mod reporter;

pub use owner::{Owner, OwnerConfig, OwnerStats};
pub use reporter::{
    CallId, Reporter, ReporterConfig, ReporterInput, ReporterOutput, ReporterStats,
};

use protocol::directory::ShortName;

use crate::BlockHash;

impl BlockHash {
    /// The part of the name that the directory speaks of.
    pub fn short(&self) -> ShortName {
        ShortName::of(&self.0)
    }
}
