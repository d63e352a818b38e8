//! What can go wrong for a client, as one closed set.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Every reason for which a request fails. Closed: a new reason is a new variant, and the compiler
/// asks for its status, its type and whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The body is not JSON; the message gives line and column.
    InvalidJson,
    /// A field has a value of the wrong type.
    InvalidType,
    /// A field has the right type and a value outside its range.
    InvalidValue,
    /// A field that must be there is not.
    MissingRequiredParameter,
    /// A field, or a combination of fields, that this server does not serve.
    UnsupportedParameter,
    /// A schema or grammar that cannot be compiled.
    InvalidGrammar,
    /// Prompt and answer do not fit into the model's context.
    ContextLengthExceeded,
    /// No key, or one that is not known here.
    InvalidApiKey,
    /// The `Host` or `Origin` of the request is foreign to an unprotected loopback server.
    OriginNotAllowed,
    /// No such path.
    NotFound,
    /// No such model on this node.
    ModelNotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The body came too slowly.
    RequestTimeout,
    /// The body is larger than the node takes.
    RequestTooLarge,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// The queue of the model is full.
    RateLimitExceeded,
    /// The client went away, or read so slowly that its stream was given up.
    Cancelled,
    /// Something failed that should not have.
    InternalError,
    /// The node that answered is gone, in the middle of the answer.
    NodeLost,
    /// The model is still being loaded.
    ModelLoading,
    /// The model could not be loaded, or its replica has stopped.
    ModelUnavailable,
    /// No memory for the KV blocks of the request at present.
    Overloaded,
    /// The node is draining.
    ShuttingDown,
    /// The deadline passed before the answer was complete.
    DeadlineExceeded,
}

impl ErrorCode {
    /// All codes, in the order of their status.
    pub const ALL: [ErrorCode; 24] = [
        ErrorCode::InvalidJson,
        ErrorCode::InvalidType,
        ErrorCode::InvalidValue,
        ErrorCode::MissingRequiredParameter,
        ErrorCode::UnsupportedParameter,
        ErrorCode::InvalidGrammar,
        ErrorCode::ContextLengthExceeded,
        ErrorCode::InvalidApiKey,
        ErrorCode::OriginNotAllowed,
        ErrorCode::NotFound,
        ErrorCode::ModelNotFound,
        ErrorCode::MethodNotAllowed,
        ErrorCode::RequestTimeout,
        ErrorCode::RequestTooLarge,
        ErrorCode::UnsupportedMediaType,
        ErrorCode::RateLimitExceeded,
        ErrorCode::Cancelled,
        ErrorCode::InternalError,
        ErrorCode::NodeLost,
        ErrorCode::ModelLoading,
        ErrorCode::ModelUnavailable,
        ErrorCode::Overloaded,
        ErrorCode::ShuttingDown,
        ErrorCode::DeadlineExceeded,
    ];

    /// The HTTP status. 499 is not registered; it is what a client that left would have seen.
    pub const fn status(self) -> u16 {
        match self {
            ErrorCode::InvalidJson
            | ErrorCode::InvalidType
            | ErrorCode::InvalidValue
            | ErrorCode::MissingRequiredParameter
            | ErrorCode::UnsupportedParameter
            | ErrorCode::InvalidGrammar
            | ErrorCode::ContextLengthExceeded => 400,
            ErrorCode::InvalidApiKey => 401,
            ErrorCode::OriginNotAllowed => 403,
            ErrorCode::NotFound | ErrorCode::ModelNotFound => 404,
            ErrorCode::MethodNotAllowed => 405,
            ErrorCode::RequestTimeout => 408,
            ErrorCode::RequestTooLarge => 413,
            ErrorCode::UnsupportedMediaType => 415,
            ErrorCode::RateLimitExceeded => 429,
            ErrorCode::Cancelled => 499,
            ErrorCode::InternalError => 500,
            ErrorCode::NodeLost => 502,
            ErrorCode::ModelLoading
            | ErrorCode::ModelUnavailable
            | ErrorCode::Overloaded
            | ErrorCode::ShuttingDown => 503,
            ErrorCode::DeadlineExceeded => 504,
        }
    }

    /// Whether the same request may succeed later, here or on another node.
    pub const fn is_retryable(self) -> bool {
        match self {
            ErrorCode::RequestTimeout
            | ErrorCode::RateLimitExceeded
            | ErrorCode::InternalError
            | ErrorCode::ModelLoading
            | ErrorCode::ModelUnavailable
            | ErrorCode::Overloaded
            | ErrorCode::ShuttingDown
            | ErrorCode::DeadlineExceeded
            | ErrorCode::NodeLost => true,
            ErrorCode::InvalidJson
            | ErrorCode::InvalidType
            | ErrorCode::InvalidValue
            | ErrorCode::MissingRequiredParameter
            | ErrorCode::UnsupportedParameter
            | ErrorCode::InvalidGrammar
            | ErrorCode::ContextLengthExceeded
            | ErrorCode::InvalidApiKey
            | ErrorCode::OriginNotAllowed
            | ErrorCode::NotFound
            | ErrorCode::ModelNotFound
            | ErrorCode::MethodNotAllowed
            | ErrorCode::RequestTooLarge
            | ErrorCode::UnsupportedMediaType
            | ErrorCode::Cancelled => false,
        }
    }

    /// The `type` in OpenAI's error object.
    pub const fn openai_type(self) -> &'static str {
        match self {
            ErrorCode::InvalidJson
            | ErrorCode::InvalidType
            | ErrorCode::InvalidValue
            | ErrorCode::MissingRequiredParameter
            | ErrorCode::UnsupportedParameter
            | ErrorCode::InvalidGrammar
            | ErrorCode::ContextLengthExceeded
            | ErrorCode::NotFound
            | ErrorCode::ModelNotFound
            | ErrorCode::MethodNotAllowed
            | ErrorCode::RequestTimeout
            | ErrorCode::RequestTooLarge
            | ErrorCode::UnsupportedMediaType
            | ErrorCode::Cancelled => "invalid_request_error",
            ErrorCode::InvalidApiKey => "authentication_error",
            ErrorCode::OriginNotAllowed => "permission_error",
            ErrorCode::RateLimitExceeded => "rate_limit_error",
            ErrorCode::InternalError
            | ErrorCode::ModelLoading
            | ErrorCode::ModelUnavailable
            | ErrorCode::Overloaded
            | ErrorCode::ShuttingDown
            | ErrorCode::DeadlineExceeded
            | ErrorCode::NodeLost => "server_error",
        }
    }

    /// The code as it stands in JSON, in metrics and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorCode::InvalidJson => "invalid_json",
            ErrorCode::InvalidType => "invalid_type",
            ErrorCode::InvalidValue => "invalid_value",
            ErrorCode::MissingRequiredParameter => "missing_required_parameter",
            ErrorCode::UnsupportedParameter => "unsupported_parameter",
            ErrorCode::InvalidGrammar => "invalid_grammar",
            ErrorCode::ContextLengthExceeded => "context_length_exceeded",
            ErrorCode::InvalidApiKey => "invalid_api_key",
            ErrorCode::OriginNotAllowed => "origin_not_allowed",
            ErrorCode::NotFound => "not_found",
            ErrorCode::ModelNotFound => "model_not_found",
            ErrorCode::MethodNotAllowed => "method_not_allowed",
            ErrorCode::RequestTimeout => "request_timeout",
            ErrorCode::RequestTooLarge => "request_too_large",
            ErrorCode::UnsupportedMediaType => "unsupported_media_type",
            ErrorCode::RateLimitExceeded => "rate_limit_exceeded",
            ErrorCode::Cancelled => "cancelled",
            ErrorCode::InternalError => "internal_error",
            ErrorCode::ModelLoading => "model_loading",
            ErrorCode::ModelUnavailable => "model_unavailable",
            ErrorCode::Overloaded => "overloaded",
            ErrorCode::ShuttingDown => "shutting_down",
            ErrorCode::DeadlineExceeded => "deadline_exceeded",
            ErrorCode::NodeLost => "node_lost",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed request, as the client shall see it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub code: ErrorCode,
    /// What is wrong, where, and what to do about it.
    pub message: String,
    /// The field that is at fault, as a path: `messages[0].content`.
    pub param: Option<String>,
    /// When to try again; sent as `Retry-After`.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        ApiError { code, message: message.into(), param: None, retry_after_s: None }
    }

    /// A field whose value is out of range; `expected` completes "must be …".
    pub fn value(param: impl Into<String>, expected: impl fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param} must be {expected}");
        ApiError::new(ErrorCode::InvalidValue, message).at(param)
    }

    /// A required field that is absent.
    pub fn missing(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param} is required");
        ApiError::new(ErrorCode::MissingRequiredParameter, message).at(param)
    }

    /// Names the field at fault.
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to try again.
    pub fn retry_after_s(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The body of the answer.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: self.code.openai_type().to_owned(),
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

/// OpenAI's envelope of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// OpenAI's error object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// Always present, `null` where no field is at fault.
    #[schema(required)]
    pub param: Option<String>,
    pub code: ErrorCode,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_serialized_names_and_all_is_complete() {
        for (i, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert_eq!(code as usize, i, "ALL is in the order of declaration");
        }
        assert_eq!(ErrorCode::ALL.len(), ErrorCode::DeadlineExceeded as usize + 1);
    }

    #[test]
    fn statuses_rise_and_server_faults_are_retryable() {
        let mut last = 0;
        for code in ErrorCode::ALL {
            let status = code.status();
            assert!((400..600).contains(&status) && status >= last, "{code}: {status}");
            last = status;
            assert_eq!(code.is_retryable(), status >= 500 || matches!(status, 408 | 429), "{code}");
        }
    }

    #[test]
    fn error_object_has_openai_shape() {
        let body = ApiError::value("temperature", "between 0 and 2").body();
        assert_eq!(
            serde_json::to_value(body).unwrap(),
            serde_json::json!({"error": {
                "message": "temperature must be between 0 and 2",
                "type": "invalid_request_error",
                "param": "temperature",
                "code": "invalid_value",
            }})
        );
    }
}
