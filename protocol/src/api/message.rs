//! Messages of a chat.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{ApiError, ErrorCode, ToolCall};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    /// The newer name of `system`.
    Developer,
    User,
    Assistant,
    Tool,
}

/// What is said: a text, or parts that are joined in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message. Only `text` is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContentPart {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Content {
    /// The whole text.
    pub fn into_text(self) -> String {
        match self {
            Content::Text(s) => s,
            Content::Parts(parts) => parts.into_iter().filter_map(|p| p.text).collect(),
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;

        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of content parts")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Content, E> {
                Ok(Content::Text(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }

        deserializer.deserialize_any(ContentVisitor)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Message {
    pub role: Role,
    /// May be absent only where the assistant called tools.
    #[serde(default)]
    pub content: Option<Content>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Calls that the assistant made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// What the assistant thought before it spoke, for templates that want it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The call that a `tool` message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl Message {
    pub(super) fn validate(&self, index: usize) -> Result<(), ApiError> {
        let calls = self.tool_calls.as_deref().unwrap_or_default();
        if !calls.is_empty() && self.role != Role::Assistant {
            let param = format!("messages[{index}].tool_calls");
            return Err(ApiError::value(param, "absent where the role is not assistant"));
        }
        if self.role == Role::Tool && self.tool_call_id.is_none() {
            return Err(ApiError::missing(format!("messages[{index}].tool_call_id")));
        }
        match &self.content {
            None if self.role == Role::Assistant && !calls.is_empty() => Ok(()),
            None => Err(ApiError::missing(format!("messages[{index}].content"))),
            Some(Content::Text(_)) => Ok(()),
            Some(Content::Parts(parts)) => parts.iter().enumerate().try_for_each(|(i, part)| {
                let at = format!("messages[{index}].content[{i}]");
                match (part.kind.as_str(), &part.text) {
                    ("text", Some(_)) => Ok(()),
                    ("text", None) => Err(ApiError::missing(format!("{at}.text"))),
                    (kind, _) => Err(ApiError::new(
                        ErrorCode::UnsupportedParameter,
                        format!("{at}.type is {kind:?}; only parts of type \"text\" are served"),
                    )
                    .at(format!("{at}.type"))),
                }
            }),
        }
    }
}
