//! Answers as server-sent events (WHATWG HTML, section 9.2), in OpenAI's dialect.
//!
//! Every event has `id: <request>:<number>`, counted from 0 up to the last, `data: [DONE]`. A stream that
//! fails ends with an event named `error`, which is no part of the answer and has no id. Silence is broken
//! by comments. A stream that another node began is written again from its journal, and shown from the
//! first event that its client has not seen.

use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use protocol::RequestId;
use protocol::api::ApiError;
use serde::Serialize;

use super::generation::{Generation, Update};

/// Turns updates into the chunks of one endpoint.
pub(crate) trait Chunks: Send + 'static {
    /// What is sent before the first update.
    fn open(&mut self, out: &mut Frames);
    /// What an update adds. Failures do not come here.
    fn update(&mut self, update: Update, out: &mut Frames);
    /// What is sent after the last update, before `[DONE]`.
    fn close(&mut self, generation: &Generation, out: &mut Frames);
}

/// The events of one stream, as far as they have not been sent.
pub(crate) struct Frames {
    request: RequestId,
    text: String,
    /// The number of the next event.
    next: u64,
    /// Those before have been seen.
    first: u64,
}

impl Frames {
    fn new(generation: &Generation) -> Frames {
        let first = generation.journal.as_ref().map_or(0, |journal| journal.first_event());
        Frames { request: generation.log.id, text: String::new(), next: 0, first }
    }

    pub fn push(&mut self, chunk: &impl Serialize) {
        if self.next < self.first {
            self.next += 1;
            return;
        }
        // Chunks are maps with string keys and finite numbers: they cannot fail to be JSON.
        if let Ok(json) = serde_json::to_string(chunk) {
            self.event(&json);
        }
    }

    fn event(&mut self, data: &str) {
        if self.next >= self.first {
            let _ = write!(self.text, "id: {}:{}\ndata: {data}\n\n", self.request, self.next);
        }
        self.next += 1;
    }

    fn error(&mut self, error: &ApiError) {
        self.text.push_str(&error_event(error));
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.text).into()
    }
}

/// The end of a stream that failed.
pub(super) fn error_event(error: &ApiError) -> String {
    let json = serde_json::to_string(&error.body()).unwrap_or_default();
    format!("event: error\ndata: {json}\n\n")
}

/// Streams a generation. The head of the answer waits for the first update, at most `keep_alive`, so
/// that a request which fails before its first token is refused with a status. The body holds the
/// generation: when the client goes, hyper drops the body, and with it the receiver that the replica
/// watches.
///
/// # Errors
/// What the first update says, when it is a failure.
pub(crate) async fn response(
    mut generation: Generation,
    mut chunks: impl Chunks,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let mut frames = Frames::new(&generation);
    chunks.open(&mut frames);
    let first = match tokio::time::timeout(keep_alive, generation.next()).await {
        Ok(Some(Update::Failed(error))) => return Err(error),
        first => first.ok(),
    };
    let mut running = Running { generation: Some(generation), chunks, frames, keep_alive };
    if let Some(first) = first {
        running.write(first);
    }
    let first = running.advance().await;
    let body = stream::unfold((first, running), |(first, mut running)| async move {
        let text = match first {
            Some(first) => first,
            None => running.advance().await?,
        };
        Some((Ok::<_, Infallible>(text), (None, running)))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks nginx not to collect the stream before passing it on.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

struct Running<C> {
    /// Until the end.
    generation: Option<Generation>,
    chunks: C,
    frames: Frames,
    keep_alive: Duration,
}

impl<C: Chunks> Running<C> {
    /// Waits for something to send. `None` after the end.
    async fn advance(&mut self) -> Option<Bytes> {
        while self.frames.text.is_empty() {
            let next = tokio::time::timeout(self.keep_alive, self.generation.as_mut()?.next());
            match next.await {
                Ok(next) => self.write(next),
                Err(_) => return Some(Bytes::from_static(KEEP_ALIVE)),
            }
        }
        Some(self.frames.take())
    }

    /// Writes an update and those that are there already.
    fn write(&mut self, mut next: Option<Update>) {
        for left in (0..UPDATES_PER_WRITE_MAX).rev() {
            let Some(generation) = &mut self.generation else { return };
            let is_end = match next {
                Some(Update::Failed(error)) => {
                    self.frames.error(&error);
                    if let Some(journal) = &generation.journal {
                        journal.failed(error.code);
                    }
                    true
                }
                Some(update) => {
                    self.chunks.update(update, &mut self.frames);
                    false
                }
                None => {
                    self.chunks.close(generation, &mut self.frames);
                    self.frames.event("[DONE]");
                    true
                }
            };
            if let Some(journal) = &generation.journal {
                journal.written(self.frames.next);
            }
            if is_end {
                self.generation = None;
                return;
            }
            next = match left {
                0 => None,
                _ => generation.try_next(),
            };
            if next.is_none() {
                return;
            }
        }
    }
}

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Updates that are written together when they are there together.
const UPDATES_PER_WRITE_MAX: usize = 64;
