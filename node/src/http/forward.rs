//! Requests whose model is elsewhere, or has less to do elsewhere: the ingress side of
//! [`protocol::forward`].
//!
//! The router chooses; this module asks the chosen node and passes its answer on. Until the first bytes
//! of an answer are here, a node that fails costs only time: the next one is asked. A stream that has
//! begun goes on at another replica ([`super::passing`]). Every wait ends: with an answer, with the
//! request's deadline, or soon after membership suspects the node, or when its path breaks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use protocol::api::{ApiError, ErrorCode};
use protocol::backup::Begin;
use protocol::forward::{self as wire, Endpoint, Forward, ForwardReply, PART_BYTES_MAX};
use protocol::journal::{self, Entry, StreamPart};
use protocol::{NodeId, RequestId};
use scheduler::router::{Ask, Choice, NoReplica, Outcome, Unavailable};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::body;
use super::error::Failure;
use super::guard::Caller;
use super::overlap;
use super::passing::{Passing, Source};
use super::{App, Journal, RequestLog, TraceParent};
use crate::kv::Overlaps;
use crate::mesh::{CallError, Copy, Heard, Request as CallRequest, Roster, SharedJournal};

/// What the router needs to know of a body.
#[derive(Deserialize)]
struct Peek {
    model: String,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    n: Option<u64>,
    #[serde(default)]
    prompt: Option<Box<RawValue>>,
    #[serde(default)]
    max_tokens: Option<u64>,
    #[serde(default)]
    max_completion_tokens: Option<u64>,
}

impl Peek {
    /// Whether the answer may have several choices: more than one of a prompt, or more than one prompt.
    fn is_plural(&self) -> bool {
        // A prompt is a text or a list of tokens; several are a list of those.
        let prompts = self.prompt.as_ref().and_then(|prompt| prompt.get().strip_prefix('['));
        let is_list = prompts.is_some_and(|first| first.trim_start().starts_with(['[', '"']));
        is_list || self.n.unwrap_or(1) > 1
    }

    /// Tokens that the answer will have: what most have, unless its client allows less.
    fn output_tokens(&self) -> u64 {
        let most = self.max_completion_tokens.or(self.max_tokens);
        most.map_or(OUTPUT_TOKENS_GUESS, |most| most.min(OUTPUT_TOKENS_GUESS))
    }
}

/// Runs the request here or has it answered elsewhere.
pub(super) async fn forward(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let Some(roster) = app.roster.get().cloned() else {
        return match text(request.headers(), LAST_EVENT_ID) {
            Some(_) => {
                let message = "this node is in no mesh: nobody else has a copy of its streams";
                let error = ApiError::new(ErrorCode::NotFound, message).at(LAST_EVENT_ID);
                Failure(error).into_response()
            }
            None => next.run(request).await,
        };
    };
    let Some(endpoint) = Endpoint::of_path(request.uri().path()) else {
        return next.run(request).await;
    };
    let (head, body) = request.into_parts();
    let bytes = match body::read(body, &app.limits).await {
        Ok(bytes) => bytes,
        Err(error) => return Failure(error).into_response(),
    };
    let here = Request::from_parts(head, Body::from(bytes.clone()));
    // What is no request is refused by the handler, which says why.
    let Ok(peek) = serde_json::from_slice(&bytes) else { return next.run(here).await };
    let traceparent = text(here.headers(), "traceparent");
    let last_event = text(here.headers(), LAST_EVENT_ID);
    let (asked, request) = (roster.clone(), caller.log.id);
    let overlap = Overlaps::default();
    let forwarding =
        Forwarding { app, roster, caller, endpoint, traceparent, peek, bytes, overlap };
    if let Some(last_event) = last_event {
        // Its client knows other nodes, and this one would break it off again.
        if let Err(error) = forwarding.app.admit() {
            return Failure(error).into_response();
        }
        return forwarding.resume(&last_event).await.unwrap_or_else(IntoResponse::into_response);
    }
    let overlap = overlap::overlap(
        &forwarding.app,
        &forwarding.caller,
        endpoint,
        &forwarding.peek.model,
        &forwarding.bytes,
    );
    let forwarding = Forwarding { overlap: overlap.await, ..forwarding };
    match forwarding.answer().await {
        Some(response) => response,
        None => {
            let response = next.run(here).await;
            asked.settle_here(request);
            response
        }
    }
}

pub(super) struct Forwarding {
    pub app: Arc<App>,
    pub roster: Arc<Roster>,
    pub caller: Caller,
    endpoint: Endpoint,
    traceparent: Option<String>,
    peek: Peek,
    bytes: Bytes,
    /// Tokens of its prompt that nodes are said to have cached.
    overlap: Overlaps,
}

/// A node's answer, of which at least the beginning is here.
pub(super) struct Answer {
    pub head: ForwardReply,
    pub body: AnswerBody,
}

pub(super) enum AnswerBody {
    Whole(Bytes),
    Stream { first: StreamPart, rest: Source },
}

/// Why a node gave no answer.
pub(super) enum Failed {
    /// It says that it cannot now; this is what it said.
    Refused(Box<Answer>),
    /// It is gone, silent or broken, or another node has asked it for the same; what that says of it.
    Lost(String, Outcome),
    /// The request's own time is over.
    Deadline,
}

/// What a call without an answer says of the node that was asked.
pub(super) fn outcome_of(error: &CallError) -> Outcome {
    match error.is_taken_over() {
        true => Outcome::Ended,
        false => Outcome::Failed,
    }
}

/// What is known of a stream that has begun.
#[derive(Default)]
pub(super) struct SoFar {
    pub journal: SharedJournal,
    /// The number of the first event that the client has not seen.
    pub next_event: u64,
    /// What it began on.
    pub weights: Option<u64>,
}

impl Forwarding {
    /// The answer of another node, or `None` if this node shall answer.
    async fn answer(self) -> Option<Response> {
        let request = self.caller.log.id;
        let mut excluded: Vec<NodeId> = Vec::new();
        let mut tried: Vec<String> = Vec::new();
        let mut refused: Option<Answer> = None;
        while excluded.len() < ATTEMPTS_MAX {
            let (node, weights) = match self.choose(&excluded, None) {
                Ok(choice) => (choice.node, choice.weights),
                Err(why) => return self.nobody(why, refused, &tried).await,
            };
            let so_far = SoFar { weights: Some(weights), ..SoFar::default() };
            if self.roster.is_own(node) {
                self.roster.settle(node, request, Outcome::TakenHere);
                return match self.peek.stream == Some(true) {
                    true => Some(self.stream_here(node, so_far).await),
                    false => None,
                };
            }
            self.caller.log.model(&self.peek.model);
            let copy = self.copy(&so_far);
            match self.attempt(node, &so_far).await {
                Ok(answer) => {
                    self.roster.settle(node, request, Outcome::Began);
                    return Some(self.pass_on(node, answer, so_far, copy).await);
                }
                Err(Failed::Refused(answer)) => {
                    self.roster.settle(node, request, answer.refusal());
                    refused = Some(*answer);
                }
                Err(Failed::Lost(why, outcome)) => {
                    self.roster.settle(node, request, outcome);
                    let name = self.roster.name_of(node);
                    tracing::warn!(request = %request, node = %name, why, "a node failed a request");
                    tried.push(format!("node {name}: {why}"));
                }
                Err(Failed::Deadline) => {
                    self.roster.settle(node, request, Outcome::Ended);
                    return Some(self.late(node));
                }
            }
            excluded.push(node);
        }
        self.nobody(NoReplica::Unavailable(Vec::new()), refused, &tried).await
    }

    /// The replica to ask: any, or one with the weights that the answer has begun on.
    pub fn choose(&self, excluded: &[NodeId], weights: Option<u64>) -> Result<Choice, NoReplica> {
        self.roster.choose(&Ask {
            request: self.caller.log.id,
            model: &self.peek.model,
            prompt_tokens: (self.bytes.len() / BYTES_PER_TOKEN) as u64,
            output_tokens: self.peek.output_tokens(),
            overlap_tokens: &self.overlap.tokens,
            below_tokens: &self.overlap.below_tokens,
            excluded,
            suspected: &[],
            weights,
        })
    }

    /// Asks a node and waits for the beginning of its answer, or for all of it if it is no stream.
    pub async fn attempt(&self, node: NodeId, so_far: &SoFar) -> Result<Answer, Failed> {
        let left = self.caller.deadline.saturating_duration_since(Instant::now());
        let asking = async {
            if let Err(why) = self.roster.connect(node).await {
                return Err(Failed::Lost(format!("cannot be reached: {why}"), Outcome::Failed));
            }
            let answer = self.ask(node, left, so_far).await;
            answer.map_err(|error| Failed::Lost(error.to_string(), outcome_of(&error)))
        };
        let answer = tokio::select! {
            answered = tokio::time::timeout(left, asking) => answered.unwrap_or(Err(Failed::Deadline))?,
            () = self.roster.lost_or_gone(node) => {
                return Err(Failed::Lost("has gone silent".to_owned(), Outcome::Failed));
            }
        };
        match answer.head.status {
            429 | 503 => Err(Failed::Refused(Box::new(answer))),
            _ => Ok(answer),
        }
    }

    async fn ask(&self, node: NodeId, left: Duration, so_far: &SoFar) -> Result<Answer, CallError> {
        let mesh = self.roster.mesh().ok_or(CallError::NotConnected(node))?;
        let journal = match &so_far.entries()[..] {
            [] => Vec::new(),
            entries => journal::to_bytes(entries),
        };
        let head = Forward {
            request: self.caller.log.id.0,
            endpoint: self.endpoint,
            tenant: self.caller.tenant.as_str().to_owned(),
            traceparent: self.traceparent.clone(),
            deadline_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            created: self.caller.created,
            body_bytes: self.bytes.len() as u64,
            journal_bytes: journal.len() as u64,
            first_event: so_far.next_event,
        };
        let call = CallRequest::new(wire::METHOD, left, head.to_bytes());
        let mut stream = mesh.open(node, &call.of(self.caller.log.id)).await?;
        for part in self.bytes.chunks(PART_BYTES_MAX).chain(journal.chunks(PART_BYTES_MAX)) {
            stream.part(part.to_vec()).await?;
        }
        stream.finish();
        let unreadable = || CallError::Unexpected { node, kind: 0 };
        let Heard::Part(bytes) = stream.next(left).await? else { return Err(unreadable()) };
        let head = ForwardReply::from_bytes(&bytes).map_err(|_| unreadable())?;
        if head.is_stream() {
            let mut rest = Source::Peer(stream);
            let body = match rest.next(left).await? {
                Some(first) => AnswerBody::Stream { first, rest },
                None => AnswerBody::Whole(Bytes::new()),
            };
            return Ok(Answer { head, body });
        }
        let mut whole = Vec::new();
        loop {
            match stream.next(left).await? {
                Heard::Part(part) if whole.len() + part.len() <= ANSWER_BYTES_MAX => {
                    whole.extend_from_slice(&part);
                }
                Heard::Reply(_) => break,
                Heard::Part(_) | Heard::End => return Err(unreadable()),
            }
        }
        Ok(Answer { head, body: AnswerBody::Whole(whole.into()) })
    }

    /// The answer of this node's own replica to a stream that another one has begun.
    pub async fn answer_here(&self, so_far: &SoFar) -> (Response, Arc<Journal>) {
        let journal = Arc::new(Journal::new(so_far.entries().clone(), so_far.next_event));
        let caller = Caller { journal: Some(journal.clone()), ..self.caller.clone() };
        let app = self.app.clone();
        let response = super::answer_here(app, self.endpoint, self.bytes.clone(), caller).await;
        (response, journal)
    }

    /// Has the stream copied, if the request asks for one.
    pub fn copy(&self, so_far: &SoFar) -> Option<Copy> {
        let weights = so_far.weights.filter(|_| self.peek.stream == Some(true))?;
        let key = (self.caller.tenant.clone(), self.caller.log.id);
        let begin = Begin {
            endpoint: self.endpoint,
            created: self.caller.created,
            weights,
            body: self.bytes.to_vec(),
        };
        let journal = so_far.journal.clone();
        Copy::start(self.roster.clone(), key, begin, journal, self.peek.is_plural())
    }

    /// This node's own answer, which another one can go on with.
    async fn stream_here(self, node: NodeId, so_far: SoFar) -> Response {
        let copy = self.copy(&so_far);
        let (response, journal) = self.answer_here(&so_far).await;
        let is_stream = |kind: &HeaderValue| kind.as_bytes().starts_with(b"text/event-stream");
        let (head, body) = response.into_parts();
        if !head.headers.get(header::CONTENT_TYPE).is_some_and(is_stream) {
            self.roster.settle(node, self.caller.log.id, Outcome::Ended);
            return Response::from_parts(head, body);
        }
        let source = Source::Here(body, journal, node);
        let body = Passing::new(self, node, source, so_far, copy).into_body(None).await;
        Response::from_parts(head, body)
    }

    /// Goes on with a stream whose ingress has died, after the event that its client has seen last.
    async fn resume(mut self, last_event: &str) -> Result<Response, Failure> {
        let place = last_event.rsplit_once(':').and_then(|(request, number)| {
            Some((request.parse::<RequestId>().ok()?, number.parse::<u64>().ok()?))
        });
        let Some((request, number)) = place else {
            let what = "the id of an event as this service writes it: <request>:<number>";
            return Err(ApiError::value(LAST_EVENT_ID, what).into());
        };
        let unknown = || {
            let message = format!(
                "no node knows stream {request}: it ended a while ago, or is another tenant's, or its \
                 copy is lost; ask again without {LAST_EVENT_ID}"
            );
            ApiError::new(ErrorCode::NotFound, message).at(LAST_EVENT_ID)
        };
        let found = self.roster.find_stream(&self.caller.tenant, request).await;
        let (begin, entries) = found.ok_or_else(unknown)?;
        let peek = serde_json::from_slice(&begin.body).map_err(|_| unknown())?;
        if begin.endpoint != self.endpoint {
            return Err(unknown().into());
        }
        tracing::info!(%request, event = number, entries = entries.len(), "a client comes back to a stream");
        let trace = self.traceparent.as_deref().and_then(TraceParent::parse);
        let log = RequestLog::new(request, "POST", self.endpoint.path(), trace, &self.app);
        log.caller(None, &self.caller.tenant);
        log.answered(200, None);
        self.caller = Caller { log, created: begin.created, ..self.caller };
        (self.peek, self.bytes) = (peek, begin.body.into());
        let so_far = SoFar {
            journal: Arc::new(Mutex::new(entries)),
            next_event: number.saturating_add(1),
            weights: Some(begin.weights),
        };
        let copy = self.copy(&so_far);
        let body = Passing::resumed(self, so_far, copy).into_body(None).await;
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        Ok((headers, body).into_response())
    }

    /// The node's answer as this node's.
    async fn pass_on(
        self,
        node: NodeId,
        answer: Answer,
        so_far: SoFar,
        copy: Option<Copy>,
    ) -> Response {
        let Answer { head, body } = answer;
        let (first, rest) = match body {
            AnswerBody::Stream { first, rest } => (first, rest),
            AnswerBody::Whole(bytes) => {
                self.roster.settle(node, self.caller.log.id, Outcome::Ended);
                return with_head(&head, Body::from(bytes));
            }
        };
        let body = Passing::new(self, node, rest, so_far, copy).into_body(Some(first)).await;
        let mut response = with_head(&head, body);
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    /// No node is left to ask.
    async fn nobody(
        &self,
        why: NoReplica,
        refused: Option<Answer>,
        tried: &[String],
    ) -> Option<Response> {
        // What the last busy node said is the best that can be said.
        if let Some(Answer { head, body: AnswerBody::Whole(bytes) }) = refused {
            return Some(with_head(&head, Body::from(bytes)));
        }
        let NoReplica::Unavailable(nodes) = why else { return self.unheard_of() };
        // This node has the model and cannot serve it now: its own sentence says why.
        if tried.is_empty() && nodes.iter().any(|(node, _)| self.roster.is_own(*node)) {
            return None;
        }
        let mut reasons = tried.to_vec();
        for (node, why) in nodes {
            if let Some(why) = explain(why) {
                reasons.push(format!("node {}: {why}", self.roster.name_of(node)));
            }
        }
        let message =
            format!("no node can answer for {:?} now: {}", self.peek.model, reasons.join("; "));
        let error = ApiError::new(ErrorCode::ModelUnavailable, message).retry_after_s(RETRY_S);
        Some(Failure(error).into_response())
    }

    /// No node says that it has the model. This node says so, unless some have said nothing yet.
    fn unheard_of(&self) -> Option<Response> {
        let unheard = self.roster.unheard();
        if unheard.is_empty() || self.app.registry.info(&self.peek.model).is_some() {
            return None;
        }
        let named = unheard.iter().take(UNHEARD_NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        let message = format!(
            "no node that this one reaches serves {:?}; what {} of the mesh's nodes serve is not known \
             here, since they cannot be reached: {named}",
            self.peek.model,
            unheard.len(),
        );
        let error = ApiError::new(ErrorCode::ModelNotFound, message).at("model");
        Some(Failure(error).into_response())
    }

    fn late(&self, node: NodeId) -> Response {
        let message = format!("node {} did not answer in time", self.roster.name_of(node));
        Failure(ApiError::new(ErrorCode::DeadlineExceeded, message)).into_response()
    }
}

impl SoFar {
    pub fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    /// What the router shall know of a node that refused.
    pub fn refusal(&self) -> Outcome {
        let seconds = self.head.retry_after_s.unwrap_or(1);
        Outcome::Refused { retry_after: Duration::from_secs(u64::from(seconds)) }
    }
}

fn with_head(head: &ForwardReply, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(head.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if let Ok(kind) = HeaderValue::from_str(&head.content_type) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    if let Some(seconds) = head.retry_after_s {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    let code = head.code.as_deref();
    if let Some(code) = ErrorCode::ALL.into_iter().find(|c| Some(c.as_str()) == code) {
        response.extensions_mut().insert(code);
    }
    response
}

fn explain(why: Unavailable) -> Option<String> {
    let seconds = |d: Duration| d.as_secs_f64();
    Some(match why {
        Unavailable::NotReady => "loads the model or drains".to_owned(),
        Unavailable::PathDown => "its path is broken".to_owned(),
        Unavailable::Failing { retry_after } => {
            format!("failed several times, is tried again in {:.1} s", seconds(retry_after))
        }
        Unavailable::Busy { retry_after } => {
            format!("has no room for {:.1} s", seconds(retry_after))
        }
        Unavailable::OtherWeights => "has other weights under this name".to_owned(),
        // Said already.
        Unavailable::Tried => return None,
    })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

/// How a client says which event of a stream it has seen last (WHATWG HTML, section 9.2).
pub(super) const LAST_EVENT_ID: &str = "last-event-id";
/// Nodes that are asked for one request.
const ATTEMPTS_MAX: usize = 3;
/// A guess, for the router only: English has about four bytes to a token, JSON around it.
const BYTES_PER_TOKEN: usize = 4;
/// Tokens of an answer, for the router only: what chats have on average, about.
const OUTPUT_TOKENS_GUESS: u64 = 256;
/// Bytes of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const RETRY_S: u32 = 2;
/// Nodes that an error names.
const UNHEARD_NAMED_MAX: usize = 8;
