//! A streamed answer that goes on when its endpoint dies.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, header};
use protocol::api::{FinishReason, Usage};

use crate::attempt::{Attempts, Call, broken, malformed};
use crate::base::Base;
use crate::chunk::Chunk;
use crate::endpoints::Fault;
use crate::error::Refusal;
use crate::seen::{Heard, Seen};
use crate::sse::{EVENT_BYTES_MAX, Parser};
use crate::{Client, Error, EventId};

/// The events of one answer: a [`Stream`], or call [`next`](Self::next).
///
/// It ends with `None` after a whole answer and after an error. Every event comes exactly once, in
/// order, whoever sends it. The request is sent when the stream is first read. Dropping the stream, at
/// any moment, closes the connection, and the node frees what the request held.
pub struct EventStream<C> {
    events: Pin<Box<dyn Stream<Item = Result<Event<C>, Error>> + Send>>,
    resumed: Arc<AtomicU32>,
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<C> {
    pub id: EventId,
    pub chunk: C,
}

impl<C: Chunk> Event<C> {
    /// What it adds to the text of the first choice; empty if nothing.
    pub fn text(&self) -> &str {
        self.chunk.text(0)
    }

    /// Why the first choice ended, in its last event.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.chunk.finish_reason(0)
    }

    /// Tokens counted, in the last event of all.
    pub fn usage(&self) -> Option<&Usage> {
        self.chunk.usage()
    }
}

impl<C: Chunk> EventStream<C> {
    pub(crate) fn new(client: Client, body: Vec<u8>) -> Self {
        let resumed = Arc::new(AtomicU32::new(0));
        let begin = Begin { client, body, resumed: resumed.clone() };
        let events = futures_util::stream::unfold(State::New(begin), |state| async move {
            let mut run = match state {
                State::New(begin) => Box::new(Run::new(begin)),
                State::Running(run) => run,
            };
            let event = run.next().await?;
            Some((event, State::Running(run)))
        });
        EventStream { events: Box::pin(events.fuse()), resumed }
    }

    /// The next event; `None` after the end. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Event<C>, Error>> {
        std::future::poll_fn(|context| self.events.as_mut().poll_next(context)).await
    }

    /// How often the stream has gone on after its connection broke.
    pub fn resumed(&self) -> u32 {
        self.resumed.load(Ordering::Relaxed)
    }

    /// The whole answer.
    ///
    /// # Errors
    /// If the stream fails, or ends before all of its choices have.
    pub async fn collect(mut self) -> Result<C::Answer, Error> {
        let wrong = |what: &str| Error::Malformed {
            endpoint: "the stream".to_owned(),
            what: what.to_owned(),
        };
        let mut open = None;
        while let Some(event) = self.next().await {
            open = Some(C::join(open, event?.chunk).map_err(wrong)?);
        }
        let open = open.ok_or_else(|| wrong("an answer without events"))?;
        C::close(open).map_err(wrong)
    }
}

impl<C> Stream for EventStream<C> {
    type Item = Result<Event<C>, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(context)
    }
}

enum State<C> {
    New(Begin),
    Running(Box<Run<C>>),
}

struct Begin {
    client: Client,
    body: Vec<u8>,
    resumed: Arc<AtomicU32>,
}

/// A stream that has been asked for.
struct Run<C> {
    client: Client,
    call: Call,
    attempts: Attempts,
    seen: Seen,
    /// Where it comes from at the moment.
    source: Option<Source>,
    ready: VecDeque<Event<C>>,
    /// Found behind what is ready.
    end: Option<End>,
    /// How often the source broke.
    breaks: u32,
    resumed: Arc<AtomicU32>,
}

struct Source {
    base: Base,
    body: Incoming,
    parser: Parser,
}

enum End {
    Done,
    Broken(Error),
    /// After an error, which was handed out.
    Over,
}

impl<C: Chunk> Run<C> {
    fn new(begin: Begin) -> Self {
        let Begin { client, body, resumed } = begin;
        Run {
            call: client.call(Method::POST, C::PATH, body),
            client,
            attempts: Attempts::default(),
            seen: Seen::default(),
            source: None,
            ready: VecDeque::new(),
            end: None,
            breaks: 0,
            resumed,
        }
    }

    async fn next(&mut self) -> Option<Result<Event<C>, Error>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            let step = match self.end.take() {
                Some(End::Done) => {
                    self.finish().await;
                    return None;
                }
                Some(End::Over) => return None,
                Some(End::Broken(why)) => self.go_on(why),
                None => self.advance().await,
            };
            if let Err(error) = step {
                (self.source, self.end) = (None, Some(End::Over));
                return Some(Err(error));
            }
        }
    }

    /// Opens the stream, or reads on.
    async fn advance(&mut self) -> Result<(), Error> {
        self.client.refresh_if_due();
        let Some(source) = &mut self.source else { return self.open().await };
        let silence = Some(self.client.options().silence_max);
        let frame = source.body.frame();
        let heard = self.client.watch(&source.base, self.call.deadline, silence, frame).await;
        let why = match heard {
            Ok(Some(Ok(frame))) => {
                if let Ok(bytes) = frame.into_data() {
                    self.take(&bytes);
                }
                return Ok(());
            }
            Ok(Some(Err(error))) => broken(&source.base, &error),
            Ok(None) => broken(&source.base, &Unfinished),
            Err(quiet) => quiet.error(&source.base, &mut self.attempts),
        };
        self.end = Some(End::Broken(why));
        Ok(())
    }

    async fn open(&mut self) -> Result<(), Error> {
        self.call.last_event = self.seen.last();
        let (base, response) = self.client.open(&self.call, &mut self.attempts).await?;
        let kind = response.headers().get(header::CONTENT_TYPE);
        if !kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
            return Err(malformed(&base, "an answer that is no stream of events"));
        }
        if self.call.last_event.is_some() {
            self.resumed.fetch_add(1, Ordering::Relaxed);
        }
        self.source =
            Some(Source { base, body: response.into_body(), parser: Parser::new(EVENT_BYTES_MAX) });
        Ok(())
    }

    /// Takes what is complete in these bytes, up to an end.
    fn take(&mut self, bytes: &Bytes) {
        let Some(source) = &mut self.source else { return };
        let mut frames = Vec::new();
        let parsed = source.parser.push(bytes, &mut frames);
        for frame in frames {
            match self.seen.hear(frame) {
                Ok(Heard::Chunk(id, chunk)) => {
                    self.attempts.progress();
                    self.ready.push_back(Event { id, chunk });
                }
                Ok(Heard::Nothing) => {}
                Ok(Heard::Done) => self.end = Some(End::Done),
                Ok(Heard::Failed(json)) => {
                    let refusal = Refusal::read(&source.base, 0, json.as_bytes());
                    self.end = Some(End::Broken(Error::BrokeOff(refusal)));
                }
                Err(garbled) => {
                    self.end = Some(End::Broken(malformed(&source.base, garbled)));
                }
            }
            if self.end.is_some() {
                return;
            }
        }
        if let Err(error) = parsed {
            self.end = Some(End::Broken(malformed(&source.base, error)));
        }
    }

    /// Lets the source go; the next one goes on with what has not been seen.
    fn go_on(&mut self, why: Error) -> Result<(), Error> {
        let source = self.source.take();
        match &why {
            Error::Deadline { .. } => return Err(why),
            Error::BrokeOff(refusal) if !refusal.is_resumable() => return Err(why),
            _ => {}
        }
        if let Some(source) = source {
            self.client.failed(&source.base, Fault::Broken);
        }
        self.breaks += 1;
        if self.breaks > BREAKS_MAX {
            return Err(Error::Exhausted { attempts: self.breaks, last: Box::new(why) });
        }
        self.attempts.fail(self.call.attempts_max, why)
    }

    /// Reads the end of the body, so that the connection can be used again.
    async fn finish(&mut self) {
        if let Some(mut source) = self.source.take() {
            let _ = tokio::time::timeout(CLOSE_MAX, source.body.frame()).await;
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("it ended before the end of the answer")]
struct Unfinished;

/// How often one stream goes on elsewhere, however far it comes in between.
const BREAKS_MAX: u32 = 256;
/// Time for the end of a body to arrive after the last event.
const CLOSE_MAX: Duration = Duration::from_millis(50);
