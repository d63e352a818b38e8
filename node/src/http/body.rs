//! Request bodies: bounded in size and time, refused by field.

use axum::body::Body;
use axum::http::{Request, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use protocol::api::{ApiError, ErrorCode};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;

use crate::options::HttpLimits;

/// Reads a JSON body.
pub(crate) async fn read_json<T: DeserializeOwned>(
    request: Request<Body>,
    limits: &HttpLimits,
) -> Result<T, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    if !kind.is_some_and(is_json) {
        let message = "the body must be declared as JSON: content-type: application/json";
        return Err(ApiError::new(ErrorCode::UnsupportedMediaType, message));
    }
    parse(&read(request.into_body(), limits).await?)
}

/// Reads a body within its bounds of size and time.
pub(crate) async fn read(body: Body, limits: &HttpLimits) -> Result<Bytes, ApiError> {
    let read = Limited::new(body, limits.body_bytes_max).collect();
    match tokio::time::timeout(limits.body_timeout, read).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {} bytes", limits.body_bytes_max);
            Err(ApiError::new(ErrorCode::RequestTooLarge, message))
        }
        Ok(Err(e)) => {
            let message = format!("the body could not be read: {e}");
            Err(ApiError::new(ErrorCode::InvalidJson, message))
        }
        Err(_) => {
            let message = format!("the body took more than {} s", limits.body_timeout.as_secs());
            Err(ApiError::new(ErrorCode::RequestTimeout, message))
        }
    }
}

/// Parses JSON; an error names the line and column, or the field.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // serde takes an array for a struct, field by field.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        serde_json::from_slice::<IgnoredAny>(bytes).map_err(|error| explain(".", &error))?;
        return Err(ApiError::new(ErrorCode::InvalidType, "the body must be a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    json.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    if error.classify() != Category::Data {
        let message = format!("the body is not valid JSON: {}", shorten(&text));
        return ApiError::new(ErrorCode::InvalidJson, message);
    }
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    let path = if path == "." { "" } else { path };
    if let Some(field) = what.strip_prefix("missing field `").and_then(|s| s.strip_suffix('`')) {
        let dot = if path.is_empty() { "" } else { "." };
        return ApiError::missing(format!("{path}{dot}{field}"));
    }
    let code = match what {
        w if w.starts_with("invalid type") => ErrorCode::InvalidType,
        _ => ErrorCode::InvalidValue,
    };
    if path.is_empty() {
        return ApiError::new(code, format!("the body: {}", shorten(what)));
    }
    ApiError::new(code, format!("{path}: {}", shorten(what))).at(path)
}

/// Errors of serde quote the value, which the client chose.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Longest quote of a parser's message.
const MESSAGE_CHARS_MAX: usize = 300;

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::api::{ChatRequest, CompletionRequest, EmbeddingRequest};

    #[test]
    fn errors_name_position_or_field() {
        use ErrorCode::*;
        for (body, code, param, part) in [
            (r#"{"model": "m","#, InvalidJson, None, "line 1 column 14"),
            ("{\n  oops}", InvalidJson, None, "line 2 column 3"),
            ("", InvalidJson, None, "line 1 column 0"),
            (r#"{"model":"m","messages":[]} x"#, InvalidJson, None, "column 29"),
            ("[1]", InvalidType, None, "must be a JSON object"),
            ("3 x", InvalidJson, None, "column 3"),
            ("{}", MissingRequiredParameter, Some("model"), "required"),
            (r#"{"model":"m"}"#, MissingRequiredParameter, Some("messages"), "required"),
            (r#"{"model":3,"messages":[]}"#, InvalidType, Some("model"), "expected a string"),
            (
                r#"{"model":"m","messages":[],"temperature":"hot"}"#,
                InvalidType,
                Some("temperature"),
                "expected f32",
            ),
            (r#"{"model":"m","messages":[],"n":-1}"#, InvalidValue, Some("n"), "expected u32"),
            (
                r#"{"model":"m","messages":[{"content":"x"}]}"#,
                MissingRequiredParameter,
                Some("messages[0].role"),
                "required",
            ),
            (
                r#"{"model":"m","messages":[{"role":"king","content":"x"}]}"#,
                InvalidValue,
                Some("messages[0].role"),
                "unknown variant `king`",
            ),
            (
                r#"{"model":"m","messages":[{"role":"user","content":[{"type":3}]}]}"#,
                InvalidType,
                Some("messages[0].content[0].type"),
                "expected a string",
            ),
            (r#"{"model":"m","messages":[],"stop":[1]}"#, InvalidType, Some("stop[0]"), "string"),
            (
                r#"{"model":"m","messages":[],"tool_choice":"never"}"#,
                InvalidValue,
                Some("tool_choice"),
                "unknown variant",
            ),
            (
                r#"{"model":"m","messages":[],"response_format":{"type":"xml"}}"#,
                InvalidValue,
                Some("response_format.type"),
                "unknown variant",
            ),
        ] {
            let error = parse::<ChatRequest>(body.as_bytes()).expect_err(body);
            assert_eq!(error.code, code, "{body}: {error}");
            assert_eq!(error.param.as_deref(), param, "{body}: {error}");
            assert!(error.message.contains(part), "{body}: {error}");
        }
    }

    #[test]
    fn other_bodies() {
        let error = parse::<CompletionRequest>(br#"{"model":"m","prompt":[1,"a"]}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt"));
        let error =
            parse::<EmbeddingRequest>(br#"{"model":"m","input":"x","encoding_format":"hex"}"#)
                .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("encoding_format"));
        let long = format!(r#"{{"model":"m","input":"x","dimensions":"{}"}}"#, "y".repeat(9999));
        let error = parse::<EmbeddingRequest>(long.as_bytes()).unwrap_err();
        assert!(error.message.len() < 500);
    }

    #[test]
    fn content_types() {
        for (kind, expect) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.api+json", true),
            ("text/plain", false),
            ("application/x-www-form-urlencoded", false),
        ] {
            assert_eq!(is_json(kind), expect, "{kind}");
        }
    }
}
