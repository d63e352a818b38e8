//! What can go wrong.

use std::time::Duration;

use protocol::api::ErrorCode;
use serde_json::Value;

use crate::EventId;
use crate::base::Base;

/// Why a call failed. Text of a stream that was handed out before is good; nothing follows it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The client was not made.
    #[error("{url:?} is no endpoint: {why}")]
    Endpoint { url: String, why: &'static str },
    /// The client was not made.
    #[error("no endpoint is given")]
    NoEndpoint,
    /// The client was not made.
    #[error("the key has characters that no HTTP header can hold")]
    Key,
    /// A node refused the request, and others would refuse it, too.
    #[error("{0}")]
    Refused(Refusal),
    /// The answer ended with an error.
    #[error("the answer broke off: {0}")]
    BrokeOff(Refusal),
    /// Nobody can go on with a stream: it ended a while ago, its node was in no mesh, or the copy is lost.
    #[error("no node knows the stream any more; its last event was {last}")]
    Lost { last: EventId },
    /// Every attempt failed; `last` says how the last one did.
    #[error("{attempts} attempts failed")]
    Exhausted {
        attempts: u32,
        #[source]
        last: Box<Error>,
    },
    /// The deadline passed; `last` says how the attempt before it failed, if one did.
    #[error("the deadline passed before the answer was complete")]
    Deadline {
        #[source]
        last: Option<Box<Error>>,
    },
    /// No connection, or it broke.
    #[error("the connection to {endpoint} failed: {why}")]
    Connection { endpoint: String, why: String },
    /// The connection stands and nothing comes.
    #[error("{endpoint} has been silent for {} s", .after.as_secs_f32())]
    Silent { endpoint: String, after: Duration },
    /// What came is nothing that a node sends.
    #[error("{endpoint} sent what is no answer: {what}")]
    Malformed { endpoint: String, what: String },
}

/// What a node said when it refused a request or gave an answer up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Base URL of who said it.
    pub endpoint: String,
    /// The HTTP status; for an error within a stream, the one that its code stands for.
    pub status: u16,
    /// `None` for a code that this client does not know.
    pub code: Option<ErrorCode>,
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// When to try again, as the node said.
    pub retry_after: Option<Duration>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.code {
            Some(code) => write!(f, "{} ({code})", self.message),
            None => write!(f, "{} (status {})", self.message, self.status),
        }
    }
}

impl Error {
    /// What a node said, if that is why.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Error::Refused(refusal) | Error::BrokeOff(refusal) => Some(refusal),
            Error::Exhausted { last, .. } => last.refusal(),
            Error::Deadline { last } => last.as_ref()?.refusal(),
            _ => None,
        }
    }

    /// The code of what a node said.
    pub fn code(&self) -> Option<ErrorCode> {
        self.refusal()?.code
    }
}

impl Refusal {
    /// From the JSON of an error; other bodies are quoted. The status is 0 for an error in a stream.
    pub(crate) fn read(base: &Base, status: u16, body: &[u8]) -> Refusal {
        let json: Value = serde_json::from_slice(body).unwrap_or_default();
        let error = &json["error"];
        let code = ErrorCode::ALL.into_iter().find(|c| error["code"] == c.as_str());
        let message = error["message"].as_str().map(str::to_owned);
        let quoted = || String::from_utf8_lossy(body).chars().take(QUOTED_CHARS_MAX).collect();
        Refusal {
            endpoint: base.as_str().to_owned(),
            status: match status {
                0 => code.map_or(500, ErrorCode::status),
                status => status,
            },
            code,
            message: message.unwrap_or_else(quoted),
            param: error["param"].as_str().map(str::to_owned),
            retry_after: None,
        }
    }

    /// Whether another node may answer, or this one later. The deadline that a node saw pass is the
    /// request's own.
    pub(crate) fn is_retryable(&self) -> bool {
        match self.code {
            Some(ErrorCode::DeadlineExceeded) => false,
            Some(code) => code.is_retryable(),
            None => self.status >= 500 || matches!(self.status, 408 | 429),
        }
    }

    /// Whether a stream that ended so may go on at another node: its ingress gave it up, not its request.
    pub(crate) fn is_resumable(&self) -> bool {
        matches!(self.code, Some(ErrorCode::NodeLost | ErrorCode::ShuttingDown))
    }
}

/// Of a body that is no error object.
const QUOTED_CHARS_MAX: usize = 300;
