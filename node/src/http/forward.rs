//! Requests whose model is elsewhere, or has less to do elsewhere: the ingress side of
//! [`protocol::forward`].
//!
//! The router chooses; this module asks the chosen node and passes its answer on. Until the first bytes
//! of an answer are here, a node that fails costs only time: the next one is asked. After that the
//! stream ends with an error event that names the node. Every wait ends: with an answer, with the
//! request's deadline, or soon after membership suspects the node, or when its path breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use protocol::api::{ApiError, ErrorCode};
use protocol::forward::{self as wire, Endpoint, Forward, ForwardReply, PART_BYTES_MAX};
use protocol::{NodeId, RequestId};
use scheduler::router::{Ask, NoReplica, Outcome, Unavailable};
use serde::Deserialize;

use super::App;
use super::body;
use super::error::Failure;
use super::guard::Caller;
use crate::mesh::{CallError, CallStream, Heard, Request as CallRequest, Roster};

/// What the router needs to know of a body.
#[derive(Deserialize)]
struct Peek {
    model: String,
}

/// Runs the request here or has it answered elsewhere.
pub(super) async fn forward(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let Some(roster) = app.roster.get().cloned() else { return next.run(request).await };
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
    let Ok(Peek { model }) = serde_json::from_slice(&bytes) else { return next.run(here).await };
    let traceparent = text(here.headers(), "traceparent");
    let forwarding = Forwarding { app, roster, caller, endpoint, traceparent, model, bytes };
    match forwarding.answer().await {
        Some(response) => response,
        None => next.run(here).await,
    }
}

struct Forwarding {
    app: Arc<App>,
    roster: Arc<Roster>,
    caller: Caller,
    endpoint: Endpoint,
    traceparent: Option<String>,
    model: String,
    bytes: Bytes,
}

/// A node's answer, of which at least the beginning is here.
struct Answer {
    head: ForwardReply,
    first: Option<Bytes>,
    stream: Option<CallStream>,
}

/// Why a node gave no answer.
enum Failed {
    /// It says that it cannot now; this is what it said.
    Refused(Answer),
    /// It is gone, silent or broken.
    Lost(String),
    /// The request's own time is over.
    Deadline,
}

impl Forwarding {
    /// The answer of another node, or `None` if this node shall answer.
    async fn answer(self) -> Option<Response> {
        let request = self.caller.log.id;
        let mut excluded: Vec<NodeId> = Vec::new();
        let mut tried: Vec<String> = Vec::new();
        let mut refused: Option<Answer> = None;
        while excluded.len() < ATTEMPTS_MAX {
            let ask = Ask {
                request,
                model: &self.model,
                prompt_tokens: (self.bytes.len() / BYTES_PER_TOKEN) as u64,
                excluded: &excluded,
                suspected: &[],
            };
            let node = match self.roster.choose(&ask) {
                Ok(choice) => choice.node,
                Err(why) => return self.nobody(why, refused, &tried).await,
            };
            if self.roster.is_own(node) {
                // Its load is read afresh for each decision: nothing is to be remembered of it.
                self.roster.settle(node, request, Outcome::Ended);
                return None;
            }
            self.caller.log.model(&self.model);
            match self.attempt(node).await {
                Ok(answer) => {
                    self.roster.settle(node, request, Outcome::Began);
                    return Some(self.pass_on(node, answer));
                }
                Err(Failed::Refused(answer)) => {
                    let seconds = answer.head.retry_after_s.unwrap_or(1);
                    let retry_after = Duration::from_secs(u64::from(seconds));
                    self.roster.settle(node, request, Outcome::Refused { retry_after });
                    refused = Some(answer);
                }
                Err(Failed::Lost(why)) => {
                    self.roster.settle(node, request, Outcome::Failed);
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

    /// Asks a node and waits for the beginning of its answer, or for all of it if it is no stream.
    async fn attempt(&self, node: NodeId) -> Result<Answer, Failed> {
        let left = self.caller.deadline.saturating_duration_since(Instant::now());
        let asking = async {
            if let Err(why) = self.roster.connect(node).await {
                return Err(Failed::Lost(format!("cannot be reached: {why}")));
            }
            self.ask(node, left).await.map_err(|error| Failed::Lost(error.to_string()))
        };
        let answer = tokio::select! {
            answered = tokio::time::timeout(left, asking) => answered.unwrap_or(Err(Failed::Deadline))?,
            () = self.roster.lost(node) => return Err(Failed::Lost("has gone silent".to_owned())),
        };
        match answer.head.status {
            429 | 503 => Err(Failed::Refused(answer)),
            _ => Ok(answer),
        }
    }

    async fn ask(&self, node: NodeId, left: Duration) -> Result<Answer, CallError> {
        let mesh = self.roster.mesh().ok_or(CallError::NotConnected(node))?;
        let head = Forward {
            request: self.caller.log.id.0,
            endpoint: self.endpoint,
            tenant: self.caller.tenant.as_str().to_owned(),
            traceparent: self.traceparent.clone(),
            deadline_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            body_bytes: self.bytes.len() as u64,
        };
        let call = CallRequest::new(wire::METHOD, left, head.to_bytes());
        let mut stream = mesh.open(node, &call.of(self.caller.log.id)).await?;
        for part in self.bytes.chunks(PART_BYTES_MAX) {
            stream.part(part.to_vec()).await?;
        }
        stream.finish();
        let unreadable = || CallError::Unexpected { node, kind: 0 };
        let Heard::Part(bytes) = stream.next(left).await? else { return Err(unreadable()) };
        let head = ForwardReply::from_bytes(&bytes).map_err(|_| unreadable())?;
        if is_stream(&head) {
            return match stream.next(left).await? {
                Heard::Part(first) => {
                    Ok(Answer { head, first: Some(first.into()), stream: Some(stream) })
                }
                Heard::Reply(_) => Ok(Answer { head, first: None, stream: None }),
                Heard::End => Err(unreadable()),
            };
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
        Ok(Answer { head, first: Some(whole.into()), stream: None })
    }

    /// The node's answer as this node's.
    fn pass_on(&self, node: NodeId, answer: Answer) -> Response {
        let Answer { head, first, stream } = answer;
        let Some(stream) = stream else {
            self.roster.settle(node, self.caller.log.id, Outcome::Ended);
            return with_head(&head, first.map(Body::from).unwrap_or_default());
        };
        let (roster, cancel) = (self.roster.clone(), self.app.cancel.clone());
        let over = async move {
            tokio::select! {
                () = roster.lost(node) => "it has gone silent",
                () = cancel.cancelled() => "this node is shutting down",
            }
        };
        let passing = Passing {
            stream,
            node,
            over: Box::pin(over),
            request: self.caller.log.id,
            roster: self.roster.clone(),
            caller: self.caller.clone(),
        };
        let body = stream::unfold((first, Some(passing)), |(first, passing)| async move {
            if let Some(first) = first {
                return Some((Ok::<_, std::convert::Infallible>(first), (None, passing)));
            }
            let (bytes, passing) = passing?.advance().await?;
            Some((Ok(bytes), (None, passing)))
        });
        let mut response = with_head(&head, Body::from_stream(body));
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
        if let Some(Answer { head, first, .. }) = refused {
            return Some(with_head(&head, first.map(Body::from).unwrap_or_default()));
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
            format!("no node can answer for {:?} now: {}", self.model, reasons.join("; "));
        let error = ApiError::new(ErrorCode::ModelUnavailable, message).retry_after_s(RETRY_S);
        Some(Failure(error).into_response())
    }

    /// No node says that it has the model. This node says so, unless some have said nothing yet.
    fn unheard_of(&self) -> Option<Response> {
        let unheard = self.roster.unheard();
        if unheard.is_empty() || self.app.registry.info(&self.model).is_some() {
            return None;
        }
        let named = unheard.iter().take(UNHEARD_NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
        let message = format!(
            "no node that this one reaches serves {:?}; what {} of the mesh's nodes serve is not known \
             here, since they cannot be reached: {named}",
            self.model,
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

/// A stream on its way through. Dropping it resets the call, which cancels the request there.
struct Passing {
    stream: CallStream,
    node: NodeId,
    /// Ends with why nothing more is awaited. One wait for all parts: to begin it for each costs time.
    over: BoxFuture<'static, &'static str>,
    request: RequestId,
    roster: Arc<Roster>,
    caller: Caller,
}

impl Passing {
    /// The next bytes; without a `Passing` beside them they are the last.
    async fn advance(mut self) -> Option<(Bytes, Option<Self>)> {
        let left = self.caller.deadline.saturating_duration_since(Instant::now());
        let heard = tokio::select! {
            biased;
            why = &mut self.over => Err(why.to_owned()),
            heard = self.stream.next(left) => heard.map_err(|error| error.to_string()),
        };
        let why = match heard {
            Ok(Heard::Part(part)) => return Some((part.into(), Some(self))),
            Ok(Heard::Reply(_)) => return None,
            Ok(Heard::End) => "the stream ended without its end".to_owned(),
            Err(why) => why,
        };
        self.roster.settle(self.node, self.request, Outcome::Failed);
        let name = self.roster.name_of(self.node);
        tracing::warn!(request = %self.request, node = %name, why, "a node broke off an answer");
        let code = ErrorCode::NodeLost;
        self.caller.log.failed(code);
        let message = format!("node {name} broke off the answer: {why}");
        let json = serde_json::to_string(&ApiError::new(code, message).body()).unwrap_or_default();
        Some((format!("event: error\ndata: {json}\n\n").into(), None))
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.roster.settle(self.node, self.request, Outcome::Ended);
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

fn is_stream(head: &ForwardReply) -> bool {
    head.content_type.starts_with("text/event-stream")
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
        // Said already.
        Unavailable::Tried => return None,
    })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

/// Nodes that are asked for one request.
const ATTEMPTS_MAX: usize = 3;
/// A guess, for the router only: English has about four bytes to a token, JSON around it.
const BYTES_PER_TOKEN: usize = 4;
/// Bytes of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const RETRY_S: u32 = 2;
/// Nodes that an error names.
const UNHEARD_NAMED_MAX: usize = 8;
