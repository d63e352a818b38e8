//! The client of a Grapevine mesh.
//!
//! Any node of a mesh answers for all of it, so a client needs no load balancer: it asks one node, learns
//! from it where the others are, and goes to the next one when a node is gone. A streamed answer goes on
//! there with the next event, nothing lost and nothing doubled.
//!
//! ```no_run
//! # async fn example() -> Result<(), grapevine::Error> {
//! use grapevine::{Client, Request};
//!
//! let client = Client::new(["http://10.0.0.1:8420", "http://10.0.0.2:8420"], Some("sk-my-key"))?;
//! let request = Request::chat("demo").user("What is Grapevine?").max_tokens(200).temperature(0.0);
//!
//! let mut answer = client.chat_stream(&request);
//! while let Some(event) = answer.next().await {
//!     print!("{}", event?.text());
//! }
//!
//! let whole = client.chat(&request).await?;
//! println!("{:?}", whole.choices[0].message.content);
//! # Ok(()) }
//! ```
//!
//! **Before the first event** an endpoint that cannot be reached, is silent, or answers with 429 or a
//! fault of its own is followed by the next; `Retry-After` is honoured, and rests between attempts grow
//! and differ. A request that is refused (4xx) fails at once. **After it** a connection that breaks, is
//! silent or carries what is no event is replaced by another one, with `Last-Event-ID`; so is one whose
//! node says that it shuts down or lost the replica. Nodes of a mesh keep what that takes for two minutes
//! (`docs/adr/0013`). A node that is in no mesh cannot do it: its streams end with [`Error::Lost`].
//!
//! **Silence** is looked into: an endpoint that sends nothing for [`probe_after`](ClientOptions) is asked
//! for its health, and is left if it does not answer. **Cancellation** is dropping: the stream, or the
//! future of a call.
//!
//! Owns the endpoints' standing, attempts and the order of events. Refuses TLS, which nodes do not speak
//! ([`Client::new`]), and every opinion about models.

mod attempt;
mod base;
mod chunk;
mod client;
mod endpoints;
mod error;
mod options;
mod request;
mod seen;
mod sse;
mod stream;

/// The API's types, as nodes have them.
pub use protocol::api;

pub use chunk::Chunk;
pub use client::Client;
pub use error::{Error, Refusal};
pub use options::ClientOptions;
pub use request::{Chat, Completion, Request};
pub use seen::EventId;
pub use stream::{Event, EventStream};
