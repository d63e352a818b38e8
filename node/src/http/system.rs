//! Endpoints that run no model: health, readiness, metrics, the list of models, the API's document.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::api::{
    ApiError, EndpointInfo, EndpointList, ErrorBody, ErrorCode, ModelInfo, ModelList,
};
use protocol::node_record::ReplicaRecord;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::error::Failure;
use crate::mesh::Api;
use crate::registry::ModelReadiness;

/// The answer of `/readyz`.
#[derive(Serialize, ToSchema)]
pub(crate) struct Readiness {
    /// `ready`, `loading`, `failed` or `draining`.
    status: &'static str,
    models: Vec<ModelReadiness>,
}

/// The process answers.
#[utoipa::path(get, path = "/healthz", tag = "system", responses((status = 200, description = "alive")))]
pub(crate) async fn healthz() -> Response {
    axum::Json(serde_json::json!({"status": "ok"})).into_response()
}

/// Every model is loaded and has made its first step, and the node is not draining.
#[utoipa::path(get, path = "/readyz", tag = "system", responses(
    (status = 200, description = "ready", body = Readiness),
    (status = 503, description = "loading, failed or draining", body = Readiness),
))]
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Response {
    let models = app.registry.readiness();
    let any = |state| models.iter().any(|m| m.state == state);
    let status = match () {
        () if app.drain.is_cancelled() => "draining",
        () if any("failed") => "failed",
        () if any("loading") => "loading",
        () => "ready",
    };
    if status == "ready" {
        return axum::Json(Readiness { status, models }).into_response();
    }
    let readiness = axum::Json(Readiness { status, models });
    let mut response = (StatusCode::SERVICE_UNAVAILABLE, readiness).into_response();
    let retry_after = HeaderValue::from(READY_RETRY_S);
    response.headers_mut().insert(header::RETRY_AFTER, retry_after);
    response
}

/// Prometheus metrics.
#[utoipa::path(get, path = "/metrics", tag = "system",
    responses((status = 200, description = "text format 0.0.4", body = String)))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([kind], app.metrics.render()).into_response()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "system",
    responses((status = 200, description = "OpenAPI 3.1")))]
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], super::openapi::document()).into_response()
}

/// The models of this node and of the nodes it knows.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses(
    (status = 200, description = "models, also those still being loaded", body = ModelList),
    (status = 401, description = "no valid key", body = ErrorBody),
))]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Response {
    let mut list = app.registry.list();
    for replica in app.roster.get().iter().flat_map(|roster| roster.models_elsewhere()) {
        if list.data.iter().all(|model| model.id != replica.model) {
            list.data.push(model_info(replica));
        }
    }
    axum::Json(list).into_response()
}

/// One model. Names may contain slashes.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "the model's name")),
    responses(
        (status = 200, description = "the model", body = ModelInfo),
        (status = 404, description = "no such model", body = ErrorBody),
    ))]
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    let elsewhere = || {
        let replicas = app.roster.get()?.models_elsewhere();
        replicas.into_iter().find(|replica| replica.model == id).map(model_info)
    };
    match app.registry.info(&id).or_else(elsewhere) {
        Some(info) => Ok(axum::Json(info).into_response()),
        None => Err(Failure(app.registry.not_found(&id))),
    }
}

/// Where else the API is: the nodes of the mesh that take requests, this one first.
///
/// Loopback addresses of other nodes are listed only where this node listens on loopback, too, and runs on
/// the same host. Nodes that drain or are suspected are left out.
#[utoipa::path(get, path = "/v1/endpoints", tag = "system", responses(
    (status = 200, description = "base URLs by node", body = EndpointList),
    (status = 401, description = "no valid key", body = ErrorBody),
))]
pub(crate) async fn endpoints(State(app): State<Arc<App>>) -> Response {
    let apis = match app.roster.get() {
        Some(roster) => roster.apis(),
        None => vec![Api::alone(app.listen)],
    };
    let info = |api: Api| EndpointInfo {
        object: "endpoint".to_owned(),
        node: api.node.map(|node| node.to_string()),
        name: api.name,
        urls: api.at.iter().map(|at| format!("http://{at}/v1")).collect(),
    };
    let data = apis.into_iter().filter(|api| !api.at.is_empty()).map(info).collect();
    let node = app.roster.get().and_then(|roster| Some(roster.mesh()?.node().to_string()));
    axum::Json(EndpointList { object: "list".to_owned(), node, data }).into_response()
}

fn model_info(replica: ReplicaRecord) -> ModelInfo {
    let context = u64::from(replica.context_tokens_max);
    ModelInfo {
        id: replica.model,
        object: "model".to_owned(),
        created: replica.created_s,
        owned_by: "grapevine".to_owned(),
        context_tokens_max: (context > 0).then_some(context),
    }
}

pub(crate) async fn not_found(request: axum::extract::Request) -> Failure {
    let path: String = request.uri().path().chars().take(PATH_CHARS_MAX).collect();
    Failure(ApiError::new(
        ErrorCode::NotFound,
        format!("there is nothing at {path}; GET /openapi.json lists what there is"),
    ))
}

pub(crate) async fn method_not_allowed(request: axum::extract::Request) -> Failure {
    let path: String = request.uri().path().chars().take(PATH_CHARS_MAX).collect();
    Failure(ApiError::new(
        ErrorCode::MethodNotAllowed,
        format!("{path} does not take {}", request.method()),
    ))
}

const READY_RETRY_S: u32 = 2;
/// Longest path that is quoted.
const PATH_CHARS_MAX: usize = 200;
