//! The HTTP API: OpenAI's endpoints, health, metrics.
//!
//! Turns bodies into requests to a replica and events into answers. Refuses to decide anything about
//! models or scheduling.

mod auth;
mod body;
mod chat;
mod completions;
#[cfg(test)]
mod continued_tests;
mod embeddings;
mod error;
mod forward;
mod generation;
mod guard;
mod journal;
mod log;
pub mod openapi;
mod overlap;
mod params;
mod passing;
mod sse;
mod system;
mod tools;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use protocol::api::{ApiError, ErrorCode};
use protocol::forward::Endpoint;
use protocol::node_record::NodeRole;
use scheduler::router::{Disagg, Policy};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

pub(crate) use guard::Caller;
pub(crate) use journal::Journal;
pub(crate) use log::{RequestLog, TraceParent};

pub use auth::{
    ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, ApiKeys, ApiKeysError, KEY_BYTES_MIN, KEYS_MAX,
};

use crate::ids::RequestIds;
use crate::kv::KvPlane;
use crate::measured::Measured;
use crate::mesh::{ControlRoutes, Roster};
use crate::metrics::Metrics;
use crate::options::HttpLimits;
use crate::registry::Registry;
use error::Failure;

/// What every handler sees.
pub(crate) struct App {
    /// Where the API listens.
    pub listen: SocketAddr,
    pub registry: Arc<Registry>,
    /// KV blocks from and to other nodes.
    pub kv: Arc<KvPlane>,
    pub metrics: Arc<Metrics>,
    pub keys: ApiKeys,
    /// For `/mesh`: none of them, and it is closed.
    pub admin_keys: ApiKeys,
    /// Refuse foreign `Host` and `Origin` headers.
    pub check_host: bool,
    pub limits: HttpLimits,
    /// What the others shall use this node for.
    pub role: NodeRole,
    /// Whether others compute prompts for this node.
    pub disagg: Disagg,
    /// By what this node chooses who answers a request.
    pub policy: Policy,
    pub ids: RequestIds,
    /// The other nodes, once this one is in a mesh.
    pub roster: OnceLock<Arc<Roster>>,
    /// What the host can do, once that is known.
    pub measured: OnceLock<Measured>,
    /// Requests that run a model, until the end of their answers.
    pub running: TaskTracker,
    /// No new work; `/readyz` says so.
    pub drain: CancellationToken,
    /// What still runs breaks off.
    pub cancel: CancellationToken,
    /// The listener closes, and each connection after the answer it is in.
    pub stop: CancellationToken,
}

impl App {
    /// Refuses new work while the node is draining.
    fn admit(&self) -> Result<(), ApiError> {
        match self.drain.is_cancelled() {
            true => Err(shutting_down()),
            false => Ok(()),
        }
    }
}

/// The endpoints that run a model.
fn inference() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
}

/// Answers a request here and nowhere else: one that came in at another node, or that another has begun.
pub(crate) async fn answer_here(
    app: Arc<App>,
    endpoint: Endpoint,
    body: Bytes,
    caller: Caller,
) -> Response {
    let mut request = Request::new(Body::from(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(endpoint.path());
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().insert(header::CONTENT_TYPE, json);
    request.extensions_mut().insert(caller);
    let handlers = inference().layer(CatchPanicLayer::custom(panicked)).with_state(app);
    match handlers.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// The API of a node; `control` is what only admins may ask.
pub(crate) fn router(app: Arc<App>, control: Option<ControlRoutes>) -> Router {
    let control = control.map_or_else(Router::new, |ControlRoutes(routes)| routes);
    let forward = axum::middleware::from_fn_with_state(app.clone(), forward::forward);
    inference()
        .route_layer(forward)
        .route("/v1/models", get(system::models))
        .route("/v1/models/{*id}", get(system::model))
        .route("/v1/endpoints", get(system::endpoints))
        .route("/healthz", get(system::healthz))
        .route("/readyz", get(system::readyz))
        .route("/metrics", get(system::metrics))
        .route("/openapi.json", get(system::openapi))
        .with_state(app.clone())
        .merge(control)
        .fallback(system::not_found)
        .method_not_allowed_fallback(system::method_not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app, guard::guard))
}

fn panicked(panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("no text");
    tracing::error!(panic = text, "a handler panicked: please report this");
    Failure(ApiError::new(
        ErrorCode::InternalError,
        "the node failed on this request; it is logged",
    ))
    .into_response()
}

fn shutting_down() -> ApiError {
    ApiError::new(ErrorCode::ShuttingDown, "this node is shutting down: ask another one")
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
