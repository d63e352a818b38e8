//! Tools that a model may call, and its calls.

use std::fmt;

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{ApiError, TOOLS_MAX};

/// The only kind of tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolType {
    #[default]
    Function,
}

/// A tool on offer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Tool {
    #[serde(rename = "type")]
    pub kind: ToolType,
    pub function: Function,
}

/// A function on offer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Function {
    /// 1 to 64 of `[A-Za-z0-9_-]`.
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A JSON schema of the arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// Whether the model may, must or must not call tools.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    Mode(ToolChoiceMode),
    Named(NamedFunction),
}

/// The general choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoiceMode {
    None,
    Auto,
    Required,
}

/// `{"type": "function", "function": {"name": …}}`: this function must be called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NamedFunction {
    #[serde(rename = "type")]
    pub kind: ToolType,
    pub function: FunctionName,
}

/// A function by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FunctionName {
    pub name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor;

        impl<'de> Visitor<'de> for ChoiceVisitor {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"none\", \"auto\", \"required\" or an object that names a function")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<ToolChoice, E> {
                let mode = de::value::StrDeserializer::<E>::new(v);
                ToolChoiceMode::deserialize(mode).map(ToolChoice::Mode)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
                let named = de::value::MapAccessDeserializer::new(map);
                NamedFunction::deserialize(named).map(ToolChoice::Named)
            }
        }

        deserializer.deserialize_any(ChoiceVisitor)
    }
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ToolCall {
    pub id: String,
    #[serde(rename = "type", default)]
    pub kind: ToolType,
    pub function: CalledFunction,
}

/// What was called, and with what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CalledFunction {
    pub name: String,
    /// JSON as the model wrote it: it may not fit the schema unless the tool is strict.
    pub arguments: String,
}

/// A piece of a call in a stream. The first piece of a call has its id, type and name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ToolCallDelta {
    /// Which call of the choice.
    pub index: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ToolType>,
    pub function: FunctionDelta,
}

/// A piece of a called function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FunctionDelta {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// To be appended to what came before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<String>,
}

/// Refuses names that templates could not carry, duplicates, and a choice of what is not on offer.
pub(super) fn validate(tools: &[Tool], choice: Option<&ToolChoice>) -> Result<(), ApiError> {
    if tools.len() > TOOLS_MAX {
        return Err(ApiError::value("tools", format_args!("at most {TOOLS_MAX} tools")));
    }
    for (i, tool) in tools.iter().enumerate() {
        let name = &tool.function.name;
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(plain) {
            let expected = format_args!("1 to {NAME_BYTES_MAX} letters, digits, _ or -");
            return Err(ApiError::value(format!("tools[{i}].function.name"), expected));
        }
        if tools[..i].iter().any(|t| t.function.name == *name) {
            return Err(ApiError::value(format!("tools[{i}].function.name"), "unique"));
        }
        if tool.function.parameters.as_ref().is_some_and(|p| !p.is_object()) {
            let param = format!("tools[{i}].function.parameters");
            return Err(ApiError::value(param, "a JSON schema, which is an object"));
        }
    }
    match choice {
        Some(ToolChoice::Mode(ToolChoiceMode::Required | ToolChoiceMode::Auto))
            if tools.is_empty() =>
        {
            Err(ApiError::value("tool_choice", "absent or \"none\" where there are no tools"))
        }
        Some(ToolChoice::Named(named))
            if !tools.iter().any(|t| t.function.name == named.function.name) =>
        {
            Err(ApiError::value("tool_choice.function.name", "the name of one of the tools"))
        }
        _ => Ok(()),
    }
}

/// Longest function name, in bytes.
const NAME_BYTES_MAX: usize = 64;
