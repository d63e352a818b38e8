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

/// Streams a generation. The head of the answer waits for the first update, at most `keep_alive`, so
/// that a request which fails before its first token is refused with a status. The body holds the generation: when the client goes, hyper drops the body,
/// and with it the receiver that the replica watches.
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
    let mut running = match tokio::time::timeout(keep_alive, generation.next()).await {
        Ok(Some(Update::Failed(error))) => return Err(error),
        Ok(first) => Running { generation, chunks, keep_alive }.write(first, &mut frames),
        Err(_) => Some(Running { generation, chunks, keep_alive }),
    };
    if frames.text.is_empty()
        && let Some(waiting) = running.take()
    {
        (frames.text, running) = waiting.advance().await;
    }
    let first = Bytes::from(frames.text);
    let body = stream::unfold((Some(first), running), |(first, running)| async move {
        if let Some(first) = first {
            return Some((Ok::<_, Infallible>(first), (None, running)));
        }
        let (text, running) = running?.advance().await;
        Some((Ok(text.into()), (None, running)))
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
    generation: Generation,
    chunks: C,
    keep_alive: Duration,
}

impl<C: Chunks> Running<C> {
    /// Waits for something to send. `None` after the end.
    async fn advance(mut self) -> (String, Option<Self>) {
        let mut frames = Frames::new(&self.generation);
        loop {
            let next = tokio::time::timeout(self.keep_alive, self.generation.next()).await;
            let Ok(next) = next else { return (": keep-alive\n\n".to_owned(), Some(self)) };
            match self.write(next, &mut frames) {
                Some(running) if frames.text.is_empty() => self = running,
                running => return (frames.text, running),
            }
        }
    }

    /// Writes an update and those that are there already. `None` after the end.
    fn write(mut self, mut next: Option<Update>, frames: &mut Frames) -> Option<Self> {
        for left in (0..UPDATES_PER_WRITE_MAX).rev() {
            frames.point(&self.generation);
            match next {
                Some(Update::Failed(error)) => {
                    if let Ok(json) = serde_json::to_string(&error.body()) {
                        frames.frame(Some("error"), &json);
                    }
                    return None;
                }
                Some(update) => self.chunks.update(update, frames),
                None => {
                    self.chunks.close(&self.generation, frames);
                    frames.frame(None, "[DONE]");
                    return None;
                }
            }
            next = match left {
                0 => None,
                _ => self.generation.try_next(),
            };
            if next.is_none() {
                break;
            }
        }
        Some(self)
    }
}

/// Updates that are written together when they are there together.
const UPDATES_PER_WRITE_MAX: usize = 64;
