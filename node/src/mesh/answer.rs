//! A request that came in at another node, answered here: the serving side of [`protocol::forward`].
//!
//! The caller has been authenticated where it came in. What runs is the same handler that answers HTTP,
//! with the same checks; its answer goes back part by part. The stream is the request's life: when the
//! ingress resets it, the answer is dropped and the replica frees its blocks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Response, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use protocol::api::ErrorCode;
use protocol::forward::{Forward, ForwardReply, PART_BYTES_MAX};
use protocol::journal::{self, JOURNAL_BYTES_MAX};
use protocol::{RequestId, TenantId};

use super::rpc::{CODE_FAILED, Heard};
use super::{Call, CallError, CallStream};
use crate::http::{self, App, Caller, Journal, RequestLog, TraceParent};

/// Answers one call; errors concern the ingress, which hears of them or is gone.
pub(super) async fn answer(app: Arc<App>, call: Call) {
    let Call { from, request, mut stream } = call;
    let forward = match Forward::from_bytes(&request.body) {
        Ok(forward) => forward,
        Err(error) => {
            let _ = stream.refuse(CODE_FAILED, &format!("no forwarded request: {error}")).await;
            return;
        }
    };
    let within = Duration::from_millis(forward.deadline_ms).min(app.limits.request_timeout);
    let request = match read_request(&mut stream, forward, &app, within).await {
        Ok(request) => request,
        Err(why) => {
            let _ = stream.refuse(CODE_FAILED, &why).await;
            return;
        }
    };
    let journal = request.journal.clone();
    let response = run(app, request, within).await;
    if let Err(error) = reply(stream, response, &journal).await {
        tracing::debug!(from = %from.short(), %error, "the ingress of a forwarded request is gone");
    }
}

/// A request as it came over the wire.
struct Forwarded {
    head: Forward,
    tenant: TenantId,
    body: Bytes,
    journal: Arc<Journal>,
}

/// Body and journal, up to the limits.
async fn read_request(
    stream: &mut CallStream,
    head: Forward,
    app: &App,
    within: Duration,
) -> Result<Forwarded, String> {
    let tenant = TenantId::new(&head.tenant).ok_or("the tenant's name is not one")?;
    let size = |bytes: u64, limit: usize, what: &str| match usize::try_from(bytes) {
        Ok(size) if size <= limit => Ok(size),
        _ => Err(format!("a {what} of {bytes} bytes is more than the {limit} taken here")),
    };
    let body_bytes = size(head.body_bytes, app.limits.body_bytes_max, "body")?;
    let total = body_bytes + size(head.journal_bytes, JOURNAL_BYTES_MAX, "journal")?;
    let mut bytes = Vec::new();
    while bytes.len() < total {
        match stream.next(within.min(app.limits.body_timeout)).await {
            Ok(Heard::Part(part)) => bytes.extend_from_slice(&part),
            Ok(Heard::Reply(_) | Heard::End) => return Err("the body ended early".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
    if bytes.len() > total {
        return Err("the body is longer than was said".to_owned());
    }
    let before = match &bytes[body_bytes..] {
        [] => Vec::new(),
        bytes => journal::from_bytes(bytes).map_err(|error| format!("no journal: {error}"))?,
    };
    bytes.truncate(body_bytes);
    let journal = Arc::new(Journal::new(before, head.first_event));
    Ok(Forwarded { head, tenant, body: bytes.into(), journal })
}

/// Gives the request to the handlers, as if it had come in here.
async fn run(app: Arc<App>, request: Forwarded, within: Duration) -> Response<Body> {
    let Forwarded { head, tenant, body, journal } = request;
    let trace = head.traceparent.as_deref().and_then(TraceParent::parse);
    let log = RequestLog::new(RequestId(head.request), "POST", head.endpoint.path(), trace, &app);
    log.caller(None, &tenant);
    let caller = Caller {
        tenant,
        log: log.clone(),
        deadline: Instant::now() + within,
        created: head.created,
        journal: Some(journal),
    };
    let response = http::answer_here(app, head.endpoint, body, caller).await;
    let code = response.extensions().get::<ErrorCode>().copied();
    log.answered(response.status().as_u16(), code);
    response
}

/// Sends head, body and end.
async fn reply(
    mut stream: CallStream,
    response: Response<Body>,
    journal: &Journal,
) -> Result<(), CallError> {
    let (head, mut body) = response.into_parts();
    let text = |name| head.headers.get(name).and_then(|v| v.to_str().ok());
    let reply = ForwardReply {
        status: head.status.as_u16(),
        content_type: text(header::CONTENT_TYPE).unwrap_or_default().to_owned(),
        retry_after_s: text(header::RETRY_AFTER).and_then(|v| v.parse().ok()),
        code: head.extensions.get::<ErrorCode>().map(|code| code.as_str().to_owned()),
    };
    let is_stream = reply.is_stream();
    stream.part(reply.to_bytes()).await?;
    let mut abandoned = std::pin::pin!(stream.abandoned());
    loop {
        let frame = tokio::select! {
            biased;
            // Dropping the body cancels the request.
            () = &mut abandoned => return Ok(()),
            frame = body.frame() => frame,
        };
        let Some(frame) = frame else { break };
        // The handlers' bodies cannot fail: they end with an event that says why.
        let Ok(frame) = frame else { return Ok(()) };
        let Ok(data) = frame.into_data() else { continue };
        if !is_stream {
            for part in data.chunks(PART_BYTES_MAX) {
                stream.part(part.to_vec()).await?;
            }
            continue;
        }
        if data.is_empty() {
            continue;
        }
        let part = journal.part(data);
        if let Some((code, why)) = journal.broken_off() {
            return stream.refuse(code, why).await;
        }
        for part in part.split() {
            stream.part(part.to_bytes()).await?;
        }
    }
    stream.reply(Vec::new()).await
}
