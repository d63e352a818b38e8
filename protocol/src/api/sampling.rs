//! How an answer is shaped: format, grammar, stream options.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ApiError, CHOICES_MAX, TOP_LOGPROBS_MAX};

/// What the answer must look like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResponseFormat {
    #[serde(rename = "type")]
    pub kind: ResponseFormatType,
    /// The schema, where `type` is `json_schema`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<JsonSchemaFormat>,
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormatType {
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that fits a schema. Always enforced token by token, whatever `strict` says.
    JsonSchema,
}

/// A named schema.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JsonSchemaFormat {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[schema(value_type = Object)]
    pub schema: serde_json::Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Extension: the answer must match a grammar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Grammar {
    #[serde(rename = "type")]
    pub kind: GrammarSyntax,
    pub value: String,
}

/// Languages of grammars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrammarSyntax {
    Lark,
    Regex,
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Send one more chunk, with `usage` and without choices, before the end.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

pub(super) fn validate_format(
    format: Option<&ResponseFormat>,
    grammar: Option<&Grammar>,
) -> Result<(), ApiError> {
    let constrained = format.is_some_and(|f| f.kind != ResponseFormatType::Text);
    if constrained && grammar.is_some() {
        return Err(ApiError::value("grammar", "absent where response_format asks for JSON"));
    }
    let Some(format) = format else { return Ok(()) };
    match (format.kind, &format.json_schema) {
        (ResponseFormatType::JsonSchema, None) => {
            Err(ApiError::missing("response_format.json_schema"))
        }
        (ResponseFormatType::JsonSchema, Some(s)) if !s.schema.is_object() => {
            Err(ApiError::value("response_format.json_schema.schema", "a JSON schema object"))
        }
        _ => Ok(()),
    }
}

pub(super) fn validate_choices(n: Option<u32>) -> Result<(), ApiError> {
    match n {
        Some(n) if !(1..=CHOICES_MAX).contains(&n) => {
            Err(ApiError::value("n", format_args!("between 1 and {CHOICES_MAX}")))
        }
        _ => Ok(()),
    }
}

pub(super) fn validate_top_logprobs(param: &str, top: Option<u32>) -> Result<(), ApiError> {
    match top {
        Some(top) if top > TOP_LOGPROBS_MAX => {
            Err(ApiError::value(param, format_args!("between 0 and {TOP_LOGPROBS_MAX}")))
        }
        _ => Ok(()),
    }
}

pub(super) fn validate_stream_options(
    stream: Option<bool>,
    options: Option<&StreamOptions>,
) -> Result<(), ApiError> {
    if options.is_some() && stream != Some(true) {
        return Err(ApiError::value("stream_options", "absent where stream is not true"));
    }
    Ok(())
}
