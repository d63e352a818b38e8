//! A request that another node answers: the wire types of the RPC method [`METHOD`].
//!
//! ```text
//! ingress ──► replica's node     Forward, then the body and the journal in parts, then the end
//! replica's node ──► ingress     ForwardReply, then the body in parts, then the end
//! ```
//!
//! The parts of a body that is a stream of events are [`StreamPart`](crate::journal::StreamPart)s.
//!
//! The ingress has authenticated the caller and names the tenant; members trust each other in that.
//! A stream that ends without its end has broken off. Whoever resets it cancels the request.

use bincode::{Decode, Encode};

use crate::wire::{self, DecodeError};

/// The name of the method, as it stands in the request frame.
pub const METHOD: &str = "forward";

/// The head of a forwarded request.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Forward {
    /// The ingress's request id, which the answer and both logs carry.
    pub request: u128,
    pub endpoint: Endpoint,
    /// Who asks.
    pub tenant: String,
    /// The caller's W3C trace context, if it sent one.
    pub traceparent: Option<String>,
    /// Time left for the whole answer, milliseconds.
    pub deadline_ms: u64,
    /// When the client asked, seconds since 1970: the answer says it, and templates may.
    pub created: u64,
    /// Bytes of the body to come.
    pub body_bytes: u64,
    /// Bytes of the [`journal`](crate::journal) to come after it: what other replicas have drawn for
    /// this request already.
    pub journal_bytes: u64,
    /// The number of the first event that is wanted: those before were seen by the client.
    pub first_event: u64,
}

/// The endpoints that run a model. The number is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Endpoint {
    Chat,
    Completions,
    Embeddings,
}

/// The head of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ForwardReply {
    /// HTTP status.
    pub status: u16,
    pub content_type: String,
    /// `Retry-After`, seconds.
    pub retry_after_s: Option<u32>,
    /// The `ErrorCode` of a failure, by its name in JSON.
    pub code: Option<String>,
}

impl Endpoint {
    pub const fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Embeddings => "/v1/embeddings",
        }
    }

    pub fn of_path(path: &str) -> Option<Endpoint> {
        [Endpoint::Chat, Endpoint::Completions, Endpoint::Embeddings]
            .into_iter()
            .find(|endpoint| endpoint.path() == path)
    }
}

impl Forward {
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no such head, or more than [`HEAD_BYTES_MAX`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Forward, DecodeError> {
        wire::decode::<_, HEAD_BYTES_MAX>(bytes)
    }
}

impl ForwardReply {
    /// Whether the body is a stream of events.
    pub fn is_stream(&self) -> bool {
        self.content_type.starts_with("text/event-stream")
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// # Errors
    /// If the bytes are no such head, or more than [`HEAD_BYTES_MAX`].
    pub fn from_bytes(bytes: &[u8]) -> Result<ForwardReply, DecodeError> {
        wire::decode::<_, HEAD_BYTES_MAX>(bytes)
    }
}

/// Bytes of either head.
pub const HEAD_BYTES_MAX: usize = 4096;
/// Bytes of one part of a body.
pub const PART_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let forward = Forward {
            request: 0x0102,
            endpoint: Endpoint::Completions,
            tenant: "acme".to_owned(),
            traceparent: None,
            deadline_ms: 60_000,
            created: 5,
            body_bytes: 2,
            journal_bytes: 9,
            first_event: 7,
        };
        let bytes = [251, 2, 1, 1, 4, b'a', b'c', b'm', b'e', 0, 251, 96, 234, 5, 2, 9, 7];
        assert_eq!(forward.to_bytes(), bytes);
        assert_eq!(Forward::from_bytes(&bytes), Ok(forward));
        let reply = ForwardReply {
            status: 429,
            content_type: "a/b".to_owned(),
            retry_after_s: Some(3),
            code: Some("x".to_owned()),
        };
        let bytes = [251, 173, 1, 3, b'a', b'/', b'b', 1, 3, 1, 1, b'x'];
        assert_eq!(reply.to_bytes(), bytes);
        assert_eq!(ForwardReply::from_bytes(&bytes), Ok(reply));
    }

    #[test]
    fn damaged_heads_are_errors() {
        let forward = Forward {
            request: u128::MAX,
            endpoint: Endpoint::Chat,
            tenant: "t".repeat(100),
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned()),
            deadline_ms: u64::MAX,
            created: u64::MAX,
            body_bytes: u64::MAX,
            journal_bytes: u64::MAX,
            first_event: u64::MAX,
        };
        let bytes = forward.to_bytes();
        for end in 0..bytes.len() {
            assert!(Forward::from_bytes(&bytes[..end]).is_err(), "{end}");
        }
        assert!(Forward::from_bytes(&[0; HEAD_BYTES_MAX + 1]).is_err());
        for i in 0..bytes.len() {
            for value in 0..=255 {
                let mut bytes = bytes.clone();
                bytes[i] = value;
                let _ = Forward::from_bytes(&bytes);
                let _ = ForwardReply::from_bytes(&bytes);
            }
        }
        assert_eq!(Endpoint::of_path("/v1/embeddings"), Some(Endpoint::Embeddings));
        assert_eq!(Endpoint::of_path("/v1/models"), None);
    }
}
