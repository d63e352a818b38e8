//! Errors as answers.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::api::{ApiError, ErrorCode};

/// An [`ApiError`] on its way out of a handler.
#[derive(Debug)]
pub(crate) struct Failure(pub ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Failure(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let code = self.0.code;
        let status =
            StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.0.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = retry_after_s(&self.0) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if code == ErrorCode::InvalidApiKey {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(code);
        response
    }
}

/// 429 and 503 always say when to come back.
fn retry_after_s(error: &ApiError) -> Option<u32> {
    let default = matches!(error.code.status(), 429 | 503).then_some(RETRY_AFTER_DEFAULT_S);
    error.retry_after_s.or(default)
}

/// `Retry-After` where nothing better is known.
const RETRY_AFTER_DEFAULT_S: u32 = 1;
