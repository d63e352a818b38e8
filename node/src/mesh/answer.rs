//! A request that came in at another node, answered here: the serving side of [`protocol::forward`].
//!
//! The caller has been authenticated where it came in. What runs is the same handler that answers HTTP,
//! with the same checks; its answer goes back part by part. The stream is the request's life: when the
//! ingress resets it, the answer is dropped and the replica frees its blocks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method as HttpMethod, Request, Response, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use protocol::api::ErrorCode;
use protocol::forward::{Forward, ForwardReply, PART_BYTES_MAX};
use protocol::{RequestId, TenantId};
use tower::ServiceExt;

use super::rpc::{CODE_FAILED, Heard};
use super::{Call, CallError, CallStream};
use crate::http::{self, App, Caller, RequestLog, TraceParent};

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
    let body = match read_body(&mut stream, &forward, &app, within).await {
        Ok(body) => body,
        Err(why) => {
            let _ = stream.refuse(CODE_FAILED, &why).await;
            return;
        }
    };
    let response = match run(app, &forward, body, within).await {
        Ok(response) => response,
        Err(why) => {
            let _ = stream.refuse(CODE_FAILED, &why).await;
            return;
        }
    };
    if let Err(error) = reply(stream, response).await {
        tracing::debug!(from = %from.short(), %error, "the ingress of a forwarded request is gone");
    }
}

/// The request's body, up to the node's own limit.
async fn read_body(
    stream: &mut CallStream,
    forward: &Forward,
    app: &App,
    within: Duration,
) -> Result<Bytes, String> {
    let limit = app.limits.body_bytes_max;
    let length = usize::try_from(forward.body_bytes).unwrap_or(usize::MAX);
    if length > limit {
        return Err(format!("a body of {length} bytes is more than the {limit} taken here"));
    }
    let mut body = Vec::new();
    while body.len() < length {
        match stream.next(within.min(app.limits.body_timeout)).await {
            Ok(Heard::Part(part)) => body.extend_from_slice(&part),
            Ok(Heard::Reply(_) | Heard::End) => return Err("the body ended early".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
    match body.len() == length {
        true => Ok(body.into()),
        false => Err("the body is longer than was said".to_owned()),
    }
}

/// Gives the request to the handlers, as if it had come in here.
async fn run(
    app: Arc<App>,
    forward: &Forward,
    body: Bytes,
    within: Duration,
) -> Result<Response<Body>, String> {
    let tenant = TenantId::new(&forward.tenant).ok_or("the tenant's name is not one")?;
    let path = forward.endpoint.path();
    let trace = forward.traceparent.as_deref().and_then(TraceParent::parse);
    let log = RequestLog::new(RequestId(forward.request), "POST", path, trace, &app);
    log.caller(None, &tenant);
    let deadline = Instant::now() + within;
    let mut request = Request::builder()
        .method(HttpMethod::POST)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body))
        .map_err(|error| error.to_string())?;
    request.extensions_mut().insert(Caller { tenant, log: log.clone(), deadline });
    let response = match http::answering(app).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let code = response.extensions().get::<ErrorCode>().copied();
    log.answered(response.status().as_u16(), code);
    Ok(response)
}

/// Sends head, body and end.
async fn reply(mut stream: CallStream, response: Response<Body>) -> Result<(), CallError> {
    let (head, mut body) = response.into_parts();
    let text = |name| head.headers.get(name).and_then(|v| v.to_str().ok());
    let reply = ForwardReply {
        status: head.status.as_u16(),
        content_type: text(header::CONTENT_TYPE).unwrap_or_default().to_owned(),
        retry_after_s: text(header::RETRY_AFTER).and_then(|v| v.parse().ok()),
        code: head.extensions.get::<ErrorCode>().map(|code| code.as_str().to_owned()),
    };
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
        if let Ok(data) = frame.into_data() {
            for part in data.chunks(PART_BYTES_MAX) {
                stream.part(part.to_vec()).await?;
            }
        }
    }
    stream.reply(Vec::new()).await
}
