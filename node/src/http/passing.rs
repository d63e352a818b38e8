//! A stream on its way through this node, and on to another replica when the one that runs it dies.
//!
//! The ingress keeps the journal of each stream that it passes on. Text and journal arrive together, so
//! it always knows exactly what its client has seen; the next replica goes through the journal without
//! a model, computes the keys and values of prompt and journal anew, and goes on with the next event.
//! Its draws are the same, since they depend on nothing but the request and the token's index.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http_body_util::BodyExt;
use protocol::NodeId;
use protocol::api::{ApiError, ErrorCode};
use protocol::journal::{Entry, JOURNAL_BYTES_MAX, StreamPart};
use scheduler::router::Outcome;

use super::forward::{Answer, AnswerBody, Failed, Forwarding, SoFar, outcome_of};
use super::{Journal, sse};
use crate::mesh::{CODE_TAKEN_OVER, CallError, CallStream, Copy, Heard, QUIET_MAX, QUIET_MIN};

/// Where a stream's parts come from. Dropping it ends the request there.
pub(super) enum Source {
    Peer(CallStream),
    /// The replica of this node, which is named.
    Here(Body, Arc<Journal>, NodeId),
}

impl Source {
    /// The next part; `None` at the end.
    pub async fn next(&mut self, within: Duration) -> Result<Option<StreamPart>, CallError> {
        match self {
            Source::Peer(stream) => part_of(stream, within).await,
            Source::Here(body, journal, node) => loop {
                // The handlers' bodies cannot fail: they end with an event that says why, also at the
                // request's deadline.
                let Some(Ok(frame)) = body.frame().await else { return Ok(None) };
                let Some(text) = frame.into_data().ok().filter(|text| !text.is_empty()) else {
                    continue;
                };
                let part = journal.part(text);
                return match journal.broken_off() {
                    // This node does not end: another has asked it for the stream.
                    Some((code @ CODE_TAKEN_OVER, why)) => {
                        Err(CallError::Refused { node: *node, code, message: why.to_owned() })
                    }
                    _ => Ok(Some(part)),
                };
            },
        }
    }
}

/// Puts a part together from its pieces.
async fn part_of(
    stream: &mut CallStream,
    within: Duration,
) -> Result<Option<StreamPart>, CallError> {
    let unreadable = |stream: &CallStream| CallError::Unexpected { node: stream.peer(), kind: 0 };
    let mut whole: Option<StreamPart> = None;
    loop {
        let piece = match stream.next(within).await? {
            Heard::Part(bytes) => StreamPart::from_bytes(&bytes).map_err(|_| unreadable(stream))?,
            Heard::Reply(_) if whole.is_none() => return Ok(None),
            Heard::Reply(_) | Heard::End => return Err(unreadable(stream)),
        };
        let part = match whole.take() {
            None => piece,
            Some(mut part) => match part.join(piece) {
                true => part,
                false => return Err(unreadable(stream)),
            },
        };
        if part.is_whole {
            return Ok(Some(part));
        }
        whole = Some(part);
    }
}

/// One stream. Dropping it resets the call, which cancels the request at its replica.
pub(super) struct Passing {
    request: Forwarding,
    /// None before another goes on.
    running: Option<Running>,
    so_far: SoFar,
    copy: Option<Copy>,
    /// What the journal takes on the wire, about.
    journal_bytes: usize,
    /// A token has come from who runs it now.
    has_token: bool,
    /// How often it has gone on elsewhere.
    moves: u32,
    ended: bool,
}

/// Who runs a stream.
struct Running {
    node: NodeId,
    source: Source,
    /// Ends with why nothing more is awaited. One wait for all parts: to begin it for each costs time.
    over: BoxFuture<'static, Broken>,
    /// Between its parts, of late. After twice as long it is looked after.
    usual: Duration,
}

impl Running {
    fn new(request: &Forwarding, node: NodeId, source: Source) -> Self {
        let (roster, cancel) = (request.roster.clone(), request.app.cancel.clone());
        let over: BoxFuture<'static, Broken> = match source {
            // It ends by itself, with an event that says why.
            Source::Here(..) => Box::pin(std::future::pending()),
            Source::Peer(_) => Box::pin(async move {
                tokio::select! {
                    () = roster.lost(node) => {
                        Broken::There("it has gone silent".to_owned(), Outcome::Failed)
                    }
                    () = cancel.cancelled() => Broken::Here,
                }
            }),
        };
        Running { node, source, over, usual: Duration::ZERO }
    }
}

impl Passing {
    pub fn new(
        request: Forwarding,
        node: NodeId,
        source: Source,
        so_far: SoFar,
        copy: Option<Copy>,
    ) -> Self {
        let running = Running::new(&request, node, source);
        let mut passing = Passing::resumed(request, so_far, copy);
        passing.running = Some(running);
        passing
    }

    /// A stream that nobody runs any more.
    pub fn resumed(request: Forwarding, so_far: SoFar, copy: Option<Copy>) -> Self {
        let journal_bytes = so_far.entries().iter().map(bytes_about).sum();
        Passing {
            request,
            running: None,
            so_far,
            copy,
            journal_bytes,
            has_token: false,
            moves: 0,
            ended: false,
        }
    }

    /// The client's body, which begins with `first` if that has come already.
    pub async fn into_body(mut self, first: Option<StreamPart>) -> Body {
        let first = match first {
            Some(first) => Some(self.keep(first).await),
            None => None,
        };
        let parts = stream::unfold((first, self), |(first, mut passing)| async move {
            let text = match first {
                Some(first) => first,
                None => passing.advance().await?,
            };
            Some((Ok::<_, std::convert::Infallible>(text), (None, passing)))
        });
        Body::from_stream(parts)
    }

    /// The next text for the client; `None` after the end.
    async fn advance(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let part = match self.next().await {
            Ok(part) => part,
            Err(why) => match self.go_on(why).await {
                Ok(part) => part,
                Err(error) => {
                    self.ended = true;
                    self.request.caller.log.failed(error.code);
                    return Some(sse::error_event(&error).into());
                }
            },
        };
        let Some(part) = part else {
            self.ended = true;
            if let Some(copy) = &self.copy {
                copy.complete();
            }
            return None;
        };
        Some(self.keep(part).await)
    }

    async fn next(&mut self) -> Result<Option<StreamPart>, Broken> {
        let left = self.request.caller.deadline.saturating_duration_since(Instant::now());
        let Some(Running { node, source, over, usual }) = &mut self.running else {
            return Err(Broken::Ingress);
        };
        let asked = Instant::now();
        let mut quiet = (*usual * 2).clamp(QUIET_MIN, QUIET_MAX);
        let is_here = matches!(source, Source::Here(..));
        let part = source.next(left);
        tokio::pin!(part);
        loop {
            tokio::select! {
                biased;
                why = &mut *over => return Err(why),
                part = &mut part => {
                    *usual = (*usual * 7 + asked.elapsed()) / 8;
                    return part.map_err(|error| {
                        Broken::There(error.to_string(), outcome_of(&error))
                    });
                }
                () = tokio::time::sleep(quiet), if !is_here => {}
            }
            // Its connection ends with it, and the part with that.
            let (roster, node) = (self.request.roster.clone(), *node);
            tokio::spawn(async move { roster.look_after(node).await });
            quiet = (quiet * 2).min(QUIET_MAX);
        }
    }

    /// Writes down what the client is about to see.
    async fn keep(&mut self, part: StreamPart) -> Bytes {
        self.journal_bytes += part.entries.iter().map(bytes_about).sum::<usize>();
        self.so_far.next_event = part.next_event;
        let is_token = |entry: &Entry| matches!(entry, Entry::Token { .. });
        if !self.has_token && part.entries.iter().any(is_token) {
            self.has_token = true;
            self.request.roster.first_token(self.request.caller.log.id);
        }
        self.so_far.entries().extend(part.entries);
        if let Some(copy) = &mut self.copy {
            copy.written().await;
        }
        part.text.into()
    }

    /// Finds another replica for the rest; gives its first part, `None` if nothing is left.
    async fn go_on(&mut self, why: Broken) -> Result<Option<StreamPart>, ApiError> {
        let request = self.request.caller.log.id;
        if Instant::now() >= self.request.caller.deadline {
            let message = "the deadline passed before the answer was complete";
            return Err(ApiError::new(ErrorCode::DeadlineExceeded, message));
        }
        self.settle(match why {
            Broken::There(_, outcome) => outcome,
            Broken::Here | Broken::Ingress => Outcome::Ended,
        });
        let node = self.running.take().map(|running| running.node);
        let said = match (why, node) {
            (Broken::Here, _) => {
                let message = "this node is shutting down";
                return Err(ApiError::new(ErrorCode::ShuttingDown, message));
            }
            (Broken::There(why, _), Some(node)) => {
                let name = self.request.roster.name_of(node);
                tracing::warn!(%request, node = %name, why, "a node broke off an answer");
                format!("node {name} broke off the answer: {why}")
            }
            _ => "the node that the client had asked is gone".to_owned(),
        };
        let lost = |more| ApiError::new(ErrorCode::NodeLost, format!("{said}; {more}"));
        if self.journal_bytes > JOURNAL_BYTES_MAX {
            return Err(lost("the answer is too long to go on elsewhere"));
        }
        self.moves += 1;
        if self.moves > MOVES_MAX {
            return Err(lost("it has gone on elsewhere too often"));
        }
        let until = self.request.caller.deadline.min(Instant::now() + GO_ON_WITHIN);
        let mut excluded: Vec<NodeId> = node.into_iter().collect();
        while Instant::now() < until {
            if let Some(part) = self.try_another(&mut excluded).await {
                self.request.app.metrics.count_continued(true);
                return Ok(part);
            }
        }
        self.request.app.metrics.count_continued(false);
        Err(lost("no other node could go on with it"))
    }

    /// One attempt, or a pause after which everyone may be asked again.
    async fn try_another(&mut self, excluded: &mut Vec<NodeId>) -> Option<Option<StreamPart>> {
        let request = self.request.caller.log.id;
        let Ok(choice) = self.request.choose(excluded, self.so_far.weights) else {
            excluded.clear();
            tokio::time::sleep(PAUSE).await;
            return None;
        };
        let node = choice.node;
        let name = self.request.roster.name_of(node);
        match self.attempt(node).await {
            Ok((first, rest)) => {
                tracing::info!(
                    %request, node = %name, event = self.so_far.next_event, "goes on with the answer"
                );
                self.request.roster.settle(node, request, Outcome::Began);
                self.request.caller.log.goes_on();
                self.running = rest.map(|rest| Running::new(&self.request, node, rest));
                self.has_token = false;
                return Some(first);
            }
            Err((outcome, why)) => {
                tracing::warn!(%request, node = %name, why, "a node did not go on with the answer");
                self.request.roster.settle(node, request, outcome);
            }
        }
        excluded.push(node);
        None
    }

    async fn attempt(&mut self, node: NodeId) -> Result<Begun, (Outcome, String)> {
        if self.request.roster.is_own(node) {
            return self.attempt_here(node).await;
        }
        let answer = match self.request.attempt(node, &self.so_far).await {
            Ok(answer) => answer,
            Err(Failed::Refused(answer)) => {
                return Err((answer.refusal(), "it has no room".to_owned()));
            }
            Err(Failed::Lost(why, outcome)) => return Err((outcome, why)),
            Err(Failed::Deadline) => return Err((Outcome::Ended, "its time is over".to_owned())),
        };
        match answer {
            Answer { body: AnswerBody::Stream { first, rest }, .. } => {
                Ok((Some(first), Some(rest)))
            }
            // A stream of nothing: all of it has been seen.
            Answer { head, .. } if head.is_stream() => Ok((None, None)),
            Answer { head, .. } => {
                Err((Outcome::Ended, format!("it answered with status {}", head.status)))
            }
        }
    }

    async fn attempt_here(&mut self, node: NodeId) -> Result<Begun, (Outcome, String)> {
        let (response, journal) = self.request.answer_here(&self.so_far).await;
        if !response.status().is_success() {
            let why = format!("it answered with status {}", response.status());
            return Err((Outcome::Ended, why));
        }
        let left = self.request.caller.deadline.saturating_duration_since(Instant::now());
        let mut source = Source::Here(response.into_body(), journal, node);
        match source.next(left).await {
            Ok(Some(first)) => Ok((Some(first), Some(source))),
            Ok(None) => Ok((None, None)),
            Err(error) => Err((Outcome::Ended, error.to_string())),
        }
    }

    fn settle(&self, outcome: Outcome) {
        if let Some(Running { node, .. }) = &self.running {
            self.request.roster.settle(*node, self.request.caller.log.id, outcome);
        }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        if !self.ended {
            // Its client has left.
            self.request.caller.log.failed(ErrorCode::Cancelled);
        }
        self.settle(Outcome::Ended);
    }
}

/// The first part of an answer and where the others come from; nothing if all has been seen.
type Begun = (Option<StreamPart>, Option<Source>);

/// Who ended a stream before its end.
enum Broken {
    /// The replica, as it says or as is seen; and what that says of it.
    There(String, Outcome),
    /// This node ends.
    Here,
    /// The node that had the client.
    Ingress,
}

/// What an entry takes on the wire, at most.
fn bytes_about(entry: &Entry) -> usize {
    match entry {
        Entry::Token { top, .. } => 16 + 9 * top.len(),
        Entry::Started { .. } | Entry::Finished { .. } => 16,
    }
}

/// A stream that two nodes ask for by turns ends some time; a client that is gone ends it before.
const MOVES_MAX: u32 = 32;
/// How long a stream waits for a replica that can go on with it. Long enough for one to be restarted by
/// its supervisor; the client sees a pause.
const GO_ON_WITHIN: Duration = Duration::from_secs(5);
/// Before everyone is asked again.
const PAUSE: Duration = Duration::from_millis(250);
