//! Answers as server-sent events (WHATWG HTML, section 9.2), in OpenAI's dialect.
//!
//! Every event has `id: <request>:<tokens generated so far>`. The stream ends with `data: [DONE]`, or
//! with an event named `error`, after which nothing comes. Silence is broken by comments.

use std::convert::Infallible;
use std::fmt::Write;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
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

/// Events that are written in one go.
pub(crate) struct Frames {
    text: String,
    id: String,
}

impl Frames {
    fn new(generation: &Generation) -> Frames {
        let mut frames = Frames { text: String::new(), id: String::new() };
        frames.point(generation);
        frames
    }

    /// Ids of the next frames name this state of the stream.
    fn point(&mut self, generation: &Generation) {
        self.id.clear();
        let _ = write!(self.id, "{}:{}", generation.log.id, generation.generated());
    }

    pub fn push(&mut self, chunk: &impl Serialize) {
        // Chunks are maps with string keys and finite numbers: they cannot fail to be JSON.
        if let Ok(json) = serde_json::to_string(chunk) {
            self.frame(None, &json);
        }
    }

    fn frame(&mut self, event: Option<&str>, data: &str) {
        if let Some(event) = event {
            let _ = writeln!(self.text, "event: {event}");
        }
        let _ = write!(self.text, "id: {}\ndata: {data}\n\n", self.id);
    }
}

/// Streams a generation. The body holds the generation: when the client goes, hyper drops the body,
/// and with it the receiver that the replica watches.
pub(crate) fn response(
    generation: Generation,
    mut chunks: impl Chunks,
    keep_alive: Duration,
) -> Response {
    let mut frames = Frames::new(&generation);
    chunks.open(&mut frames);
    let first = Bytes::from(frames.text);
    let running = Running { generation, chunks, keep_alive };
    let body = stream::unfold((Some(first), Some(running)), |(first, running)| async move {
        if let Some(first) = first.filter(|first| !first.is_empty()) {
            return Some((Ok::<_, Infallible>(first), (None, running)));
        }
        let (bytes, running) = running?.advance().await;
        Some((Ok(bytes), (None, running)))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks nginx not to collect the stream before passing it on.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

struct Running<C> {
    generation: Generation,
    chunks: C,
    keep_alive: Duration,
}

impl<C: Chunks> Running<C> {
    /// Waits for something to send. `None` after the end.
    async fn advance(mut self) -> (Bytes, Option<Self>) {
        let mut frames = Frames::new(&self.generation);
        while frames.text.is_empty() {
            let next = tokio::time::timeout(self.keep_alive, self.generation.next()).await;
            let Ok(mut next) = next else {
                return (Bytes::from_static(b": keep-alive\n\n"), Some(self));
            };
            let mut taken = 0;
            loop {
                frames.point(&self.generation);
                match next {
                    Some(Update::Failed(error)) => {
                        if let Ok(json) = serde_json::to_string(&error.body()) {
                            frames.frame(Some("error"), &json);
                        }
                        return (frames.text.into(), None);
                    }
                    Some(update) => self.chunks.update(update, &mut frames),
                    None => {
                        self.chunks.close(&self.generation, &mut frames);
                        frames.frame(None, "[DONE]");
                        return (frames.text.into(), None);
                    }
                }
                taken += 1;
                if taken == UPDATES_PER_WRITE_MAX {
                    break;
                }
                next = match self.generation.try_next() {
                    Some(update) => Some(update),
                    None => break,
                };
            }
        }
        (frames.text.into(), Some(self))
    }
}

/// Updates that are written together when they are there together.
const UPDATES_PER_WRITE_MAX: usize = 64;
