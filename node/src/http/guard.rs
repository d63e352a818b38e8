//! What happens before a handler runs: a request id, the check of the host, the check of the key.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use protocol::TenantId;
use protocol::api::{ApiError, ErrorCode};

use super::error::Failure;
use super::journal::Journal;
use super::log::{RequestLog, TraceParent};
use super::{App, unix_now};

/// Who asks, for handlers.
#[derive(Clone)]
pub(crate) struct Caller {
    pub tenant: TenantId,
    pub log: Arc<RequestLog>,
    /// When its answer must be complete.
    pub deadline: Instant,
    /// When it asked, seconds since 1970: where one answer is made on two nodes, both say the same.
    pub created: u64,
    /// Where the stream is written down, for another node to go on with it.
    pub journal: Option<Arc<Journal>>,
}

/// Names the request, lets it through or refuses it, and names the answer.
pub(crate) async fn guard(
    State(app): State<Arc<App>>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let headers = request.headers();
    let trace = headers.get("traceparent").and_then(|v| v.to_str().ok());
    let log = RequestLog::new(
        app.ids.next(),
        request.method().as_str(),
        request.uri().path(),
        trace.and_then(TraceParent::parse),
        &app,
    );
    let host = if app.check_host { check_host(headers, request.uri()) } else { Ok(()) };
    let admitted = host
        .and_then(|()| authenticate(&app, request.uri().path(), headers, &log))
        .and_then(|tenant| Ok((tenant, timeout(headers, app.limits.request_timeout)?)));
    let mut response = match admitted {
        Ok((tenant, timeout)) => {
            let deadline = log.started + timeout;
            request.extensions_mut().insert(Caller {
                tenant,
                log: log.clone(),
                deadline,
                created: unix_now(),
                journal: None,
            });
            next.run(request).await
        }
        Err(error) => Failure(error).into_response(),
    };
    let code = response.extensions().get::<ErrorCode>().copied();
    log.answered(response.status().as_u16(), code);
    if let Ok(id) = HeaderValue::from_str(&log.id.to_string()) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// What lies below is for admins, with keys of their own: no client of the API can change the mesh.
const ADMIN_PATHS: [&str; 2] = ["/mesh", "/admin"];

/// Paths that say nothing about a tenant, and that probes ask without a key.
const PUBLIC: [&str; 3] = ["/healthz", "/readyz", "/openapi.json"];

fn authenticate(
    app: &App,
    path: &str,
    headers: &HeaderMap,
    log: &RequestLog,
) -> Result<TenantId, ApiError> {
    let is_below = |above: &str| path.strip_prefix(above).is_some_and(|p| p.starts_with('/'));
    let admin = ADMIN_PATHS.iter().any(|above| path == *above || is_below(above));
    let keys = if admin { &app.admin_keys } else { &app.keys };
    let refuse = |message: &str| Err(ApiError::new(ErrorCode::InvalidApiKey, message));
    if admin && keys.is_empty() {
        return refuse(
            "this node has no admin key, so it is asked over its Unix socket only (--data); start it \
             with --admin-keys FILE or VINE_ADMIN_KEY to ask it from elsewhere",
        );
    }
    if keys.is_empty() || PUBLIC.contains(&path) {
        let tenant = TenantId::local();
        log.caller(None, &tenant);
        return Ok(tenant);
    }
    let Some(value) = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) else {
        return refuse("an API key is needed: send the header authorization: Bearer <key>");
    };
    let bearer = value.split_once(' ').filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
    let Some((_, key)) = bearer else {
        return refuse("the authorization header must have the form: Bearer <key>");
    };
    match keys.check(key.trim()) {
        Some((name, tenant)) => {
            log.caller(Some(name), tenant);
            Ok(tenant.clone())
        }
        None if admin => refuse("this is no admin key of this node"),
        None => refuse("this API key is not known here"),
    }
}

/// What the client asks for, at most what the node allows.
fn timeout(headers: &HeaderMap, most: Duration) -> Result<Duration, ApiError> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(most) };
    match value.to_str().ok().and_then(|v| v.trim().parse::<u64>().ok()) {
        Some(ms) if ms > 0 => Ok(Duration::from_millis(ms).min(most)),
        _ => Err(ApiError::value(TIMEOUT_HEADER, "a whole number of milliseconds, at least 1")),
    }
}

/// A web page that the owner of this machine visits can make the browser send requests to loopback,
/// under a name of the page's own (DNS rebinding). Such requests carry a foreign `Host` or `Origin`.
fn check_host(headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|v: &HeaderValue| v.to_str().unwrap_or("?"));
    let host = text(header::HOST).or(uri.authority().map(|a| a.as_str()));
    let origin = text(header::ORIGIN);
    let origin_host = origin.map(|o| o.split_once("://").map_or(o, |(_, host)| host));
    for (name, value) in [("host", host), ("origin", origin_host)] {
        if value.is_some_and(|v| !is_loopback(v)) {
            let message = format!(
                "the {name} header names another host; a node on loopback without API keys answers \
                 only to localhost"
            );
            return Err(ApiError::new(ErrorCode::OriginNotAllowed, message));
        }
    }
    Ok(())
}

fn is_loopback(host_and_port: &str) -> bool {
    let (host, port) = match host_and_port.strip_prefix('[') {
        Some(v6) => match v6.split_once(']') {
            Some((host, port)) => (host, port),
            None => return false,
        },
        None => match host_and_port.find(':') {
            Some(colon) => host_and_port.split_at(colon),
            None => (host_and_port, ""),
        },
    };
    let port_ok = port.is_empty()
        || port.strip_prefix(':').is_some_and(|p| !p.is_empty() && p.parse::<u16>().is_ok());
    let name_ok = host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    port_ok && name_ok
}

/// How a client says how long its request may take, in milliseconds.
pub(crate) const TIMEOUT_HEADER: &str = "x-request-timeout-ms";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts() {
        let most = Duration::from_secs(10);
        for (value, expect) in [
            ("250", Some(Duration::from_millis(250))),
            (" 9999 ", Some(Duration::from_millis(9_999))),
            ("86400000", Some(most)),
            ("0", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("99999999999999999999", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT_HEADER, HeaderValue::from_static(value));
            assert_eq!(timeout(&headers, most).ok(), expect, "{value:?}");
        }
        assert_eq!(timeout(&HeaderMap::new(), most).ok(), Some(most));
    }

    #[test]
    fn hosts() {
        for (host, expect) in [
            ("localhost", true),
            ("LOCALHOST:8420", true),
            ("127.0.0.1:8420", true),
            ("127.8.8.8", true),
            ("[::1]:8420", true),
            ("[::1]", true),
            ("", false),
            ("null", false),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("localhost:80@evil.example", false),
            ("127.0.0.1.evil.example:80", false),
            ("10.0.0.1:8420", false),
            ("[::1", false),
            ("[2001:db8::1]:80", false),
            ("localhost:", false),
        ] {
            assert_eq!(is_loopback(host), expect, "{host:?}");
        }
    }
}
