//! Calls between members: one bidirectional stream each.
//!
//! ```text
//! caller   request {method, request id, deadline, body}, parts*, end
//! callee   parts*, then reply {body} or error {code, message}, end
//! ```
//!
//! Cancelling is resetting the stream, by either side.

use std::time::Duration;

use bincode::{Decode, Encode};
use protocol::frame::{Frame, Kind};
use protocol::{NodeId, RequestId};
use thiserror::Error;

use super::frames::{FrameRate, FrameReader, FrameWriter, StreamError};

/// Method: authority sets, revocations and uses of tokens that the caller knows.
pub(crate) const TRUST: &str = "trust";

/// Method: whether the callee knows all that [`TRUST`] would say, by a digest of it. The reply is empty if so.
pub(crate) const TRUST_DIGEST: &str = "trust?";

/// Method: the body comes back. For measuring and for tests.
pub const ECHO: &str = "echo";

/// The first frame of a call.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Request {
    /// The method's name; an unknown one is answered with an error.
    pub method: String,
    /// Which request of a client this belongs to, for logs on every node; zero if none.
    pub request: u128,
    /// How long the caller waits for the whole answer, in milliseconds.
    pub deadline_ms: u32,
    pub body: Vec<u8>,
}

impl Request {
    pub fn new(method: &str, deadline: Duration, body: Vec<u8>) -> Self {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        Request { method: method.to_owned(), request: 0, deadline_ms, body }
    }

    /// For a request of a client.
    pub fn of(self, request: RequestId) -> Self {
        Request { request: request.0, ..self }
    }
}

#[derive(Encode, Decode)]
struct WireError {
    code: u16,
    message: String,
}

/// Why a call has no reply.
#[derive(Debug, Error)]
pub enum CallError {
    #[error("node {} is not connected", .0.short())]
    NotConnected(NodeId),
    #[error("node {} answered with an error ({code}): {message}", node.short())]
    Refused { node: NodeId, code: u16, message: String },
    #[error("node {} did not answer within {} ms", node.short(), after.as_millis())]
    Deadline { node: NodeId, after: Duration },
    #[error("the stream to node {} broke off: {source}", node.short())]
    Broken { node: NodeId, source: StreamError },
    #[error("node {} sent a frame of kind {kind} where a reply belongs", node.short())]
    Unexpected { node: NodeId, kind: u16 },
}

/// The callee knows no such method.
pub(crate) const CODE_METHOD: u16 = 1;
/// The callee failed.
pub const CODE_FAILED: u16 = 2;
/// The callee was asked for the same by another node, which has it now.
pub const CODE_TAKEN_OVER: u16 = 3;

impl CallError {
    /// Whether nothing failed: another node has asked the callee for the same.
    pub fn is_taken_over(&self) -> bool {
        matches!(self, CallError::Refused { code: CODE_TAKEN_OVER, .. })
    }
}

/// A call that came in. Dropping it without an answer resets the stream.
pub struct Call {
    pub from: NodeId,
    pub request: Request,
    pub stream: CallStream,
}

/// One side of a call.
pub struct CallStream {
    pub(super) peer: NodeId,
    pub(super) reader: FrameReader,
    pub(super) writer: FrameWriter,
    pub(super) rate: std::sync::Arc<FrameRate>,
    pub(super) stream_timeout: Duration,
}

/// What the other side of a call says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Part(Vec<u8>),
    /// The last word, of the callee.
    Reply(Vec<u8>),
    /// The other side says nothing more.
    End,
}

impl CallStream {
    /// The node at the other end.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// Sends one part.
    pub async fn part(&mut self, body: Vec<u8>) -> Result<(), CallError> {
        self.send(Frame { kind: Kind::RPC_PART, body }).await
    }

    /// Ends a call with its reply.
    pub async fn reply(mut self, body: Vec<u8>) -> Result<(), CallError> {
        self.send(Frame { kind: Kind::RPC_REPLY, body }).await?;
        self.writer.finish();
        Ok(())
    }

    /// Ends a call with an error; the message is for people.
    pub async fn refuse(mut self, code: u16, message: &str) -> Result<(), CallError> {
        let message = message.chars().take(MESSAGE_CHARS_MAX).collect();
        self.send(Frame::new(Kind::RPC_ERROR, &WireError { code, message })).await?;
        self.writer.finish();
        Ok(())
    }

    /// Returns when the other side does not want what is still to come. One such wait may last as long
    /// as the stream.
    pub fn abandoned(&self) -> impl Future<Output = ()> + Send + 'static {
        self.writer.stopped()
    }

    /// Says that no further part comes from this side, which the caller's last word is.
    pub fn finish(&mut self) {
        self.writer.finish();
    }

    /// What the other side says next, within a time.
    pub async fn next(&mut self, within: Duration) -> Result<Heard, CallError> {
        let node = self.peer;
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let frame = match self.reader.next_within(&self.rate, left).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Heard::End),
                Err(StreamError::Timeout { .. }) => {
                    return Err(CallError::Deadline { node, after: within });
                }
                Err(source) => return Err(CallError::Broken { node, source }),
            };
            return match frame.kind {
                Kind::RPC_PART => Ok(Heard::Part(frame.body)),
                Kind::RPC_REPLY => Ok(Heard::Reply(frame.body)),
                Kind::RPC_ERROR => {
                    let WireError { code, message } = frame
                        .value::<WireError, ERROR_BYTES_MAX>()
                        .unwrap_or(WireError { code: 0, message: "unreadable".to_owned() });
                    Err(CallError::Refused { node, code, message: printable(&message) })
                }
                kind if kind.is_optional() => continue,
                Kind(kind) => Err(CallError::Unexpected { node, kind }),
            };
        }
    }

    pub(super) async fn send(&mut self, frame: Frame) -> Result<(), CallError> {
        let node = self.peer;
        let sent = self.writer.send(&frame, self.stream_timeout).await;
        sent.map_err(|source| CallError::Broken { node, source })
    }
}

/// A peer's words in our logs and terminals: no control characters.
fn printable(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect()
}

const MESSAGE_CHARS_MAX: usize = 500;
const ERROR_BYTES_MAX: usize = 4096;
