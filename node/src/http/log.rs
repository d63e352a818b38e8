//! One line and one count for each request, written when the last holder of its log lets go: for a
//! stream that is the end of the stream, for a client that left the moment it left.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use protocol::api::ErrorCode;
use protocol::{RequestId, TenantId};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::App;
use crate::metrics::{Metrics, Operation};

/// What is known about a request that is being served.
pub(crate) struct RequestLog {
    pub id: RequestId,
    pub started: Instant,
    method: String,
    path: String,
    operation: Operation,
    trace: Option<TraceParent>,
    metrics: Arc<Metrics>,
    outcome: Mutex<Outcome>,
    /// Keeps a draining node up.
    _running: Option<TaskTrackerToken>,
}

#[derive(Default)]
struct Outcome {
    status: Option<u16>,
    code: Option<ErrorCode>,
    tenant: Option<TenantId>,
    key: Option<String>,
    model: Option<String>,
    tokens: Option<(u64, u64, u64)>,
}

impl RequestLog {
    pub fn new(
        id: RequestId,
        method: &str,
        path: &str,
        trace: Option<TraceParent>,
        app: &App,
    ) -> Arc<Self> {
        let operation = Operation::of_path(path);
        Arc::new(RequestLog {
            id,
            started: Instant::now(),
            method: method.to_owned(),
            path: path.chars().take(PATH_CHARS_MAX).collect(),
            operation,
            trace,
            metrics: app.metrics.clone(),
            outcome: Mutex::default(),
            _running: (operation != Operation::Other).then(|| app.running.token()),
        })
    }

    /// Who asks.
    pub fn caller(&self, key: Option<&str>, tenant: &TenantId) {
        self.edit(|o| {
            o.key = key.map(str::to_owned);
            o.tenant = Some(tenant.clone());
        });
    }

    /// The model that serves; only names of the registry come here.
    pub fn model(&self, model: &str) {
        self.edit(|o| o.model = Some(model.to_owned()));
    }

    /// The answer's head has been made.
    pub fn answered(&self, status: u16, code: Option<ErrorCode>) {
        self.edit(|o| {
            o.status = Some(status);
            o.code = o.code.or(code);
        });
    }

    /// The request failed; also after its head was sent.
    pub fn failed(&self, code: ErrorCode) {
        self.edit(|o| o.code = Some(code));
    }

    /// The answer goes on after it had failed.
    pub fn goes_on(&self) {
        self.edit(|o| o.code = None);
    }

    /// Tokens of prompt, of them cached, and of the answer.
    pub fn tokens(&self, prompt: u64, cached: u64, generated: u64) {
        self.edit(|o| o.tokens = Some((prompt, cached, generated)));
    }

    fn edit(&self, change: impl FnOnce(&mut Outcome)) {
        change(&mut self.outcome.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        let outcome = self.outcome.get_mut().unwrap_or_else(PoisonError::into_inner);
        if outcome.status.is_none() {
            outcome.code = Some(ErrorCode::Cancelled);
        }
        let status = outcome.status.unwrap_or(ErrorCode::Cancelled.status());
        let took = self.started.elapsed();
        self.metrics.count_request(
            self.operation,
            outcome.model.as_deref(),
            status,
            outcome.code,
            took,
        );
        let (prompt, cached, generated) = outcome.tokens.unwrap_or_default();
        tracing::info!(
            request = %self.id,
            method = %self.method,
            path = %self.path,
            status,
            code = outcome.code.map_or("ok", ErrorCode::as_str),
            tenant = outcome.tenant.as_ref().map_or("", TenantId::as_str),
            key = outcome.key.as_deref().unwrap_or(""),
            model = outcome.model.as_deref().unwrap_or(""),
            prompt_tokens = prompt,
            cached_tokens = cached,
            completion_tokens = generated,
            took_ms = took.as_secs_f64() * 1e3,
            trace = self.trace.as_ref().map_or("", TraceParent::trace_id),
            span = self.trace.as_ref().map_or("", TraceParent::parent_id),
            "request"
        );
    }
}

/// A caller's W3C trace context (version 00), for the logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent(String);

impl TraceParent {
    /// The header's value if it is well-formed; anything else is as if it were absent.
    pub fn parse(value: &str) -> Option<Self> {
        let hex = |s: &str, len: usize| {
            s.len() == len && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let parts: Vec<&str> = value.splitn(5, '-').collect();
        match parts[..] {
            ["00", trace, parent, flags]
                if hex(trace, 32)
                    && hex(parent, 16)
                    && hex(flags, 2)
                    && trace.bytes().any(|b| b != b'0')
                    && parent.bytes().any(|b| b != b'0') =>
            {
                Some(TraceParent(value.to_owned()))
            }
            _ => None,
        }
    }

    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }

    pub fn parent_id(&self) -> &str {
        &self.0[36..52]
    }
}

/// Longest path that is logged.
const PATH_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_parents() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parsed = TraceParent::parse(good).unwrap();
        assert_eq!(parsed.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parsed.parent_id(), "00f067aa0ba902b7");
        for bad in [
            "",
            "00",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
    }
}
