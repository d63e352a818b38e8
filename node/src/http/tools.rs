//! Tools in a chat: what the model is told, what it must do, and its calls in its text.

use engine::chat::{ToolEvent, ToolParser};
use engine::grammar::ToolGrammar;
use protocol::api::{
    ApiError, ChatRequest, Delta, ErrorCode, FunctionDelta, ResponseFormatType, Tool,
    ToolCallDelta, ToolChoice, ToolChoiceMode, ToolType,
};
use protocol::{RequestId, TokenId};
use serde_json::json;

use crate::model::Model;

/// Whether the model hears of the tools.
pub(crate) fn are_offered(request: &ChatRequest) -> bool {
    request.tools.as_ref().is_some_and(|tools| !tools.is_empty())
        && request.tool_choice != Some(ToolChoice::Mode(ToolChoiceMode::None))
}

/// The tools of a request.
pub(crate) struct Offer {
    names: Vec<String>,
    /// Whether one answer may have several calls.
    parallel: bool,
    /// What the answer is held to, where `tool_choice` demands a call.
    pub must_call: Option<ToolGrammar>,
}

impl Offer {
    /// `None` where no tools are on offer.
    pub fn new(request: &ChatRequest, model: &Model) -> Result<Option<Offer>, ApiError> {
        if !are_offered(request) {
            return Ok(None);
        }
        let tools = request.tools.as_deref().unwrap_or_default();
        let parallel = request.parallel_tool_calls != Some(false);
        let must_call = match &request.tool_choice {
            Some(ToolChoice::Mode(ToolChoiceMode::Required)) => {
                Some((tools.iter().map(schema).collect(), parallel))
            }
            Some(ToolChoice::Named(named)) => {
                let chosen = tools.iter().filter(|t| t.function.name == named.function.name);
                Some((chosen.map(schema).collect(), false))
            }
            _ => None,
        };
        let constrained =
            request.response_format.as_ref().is_some_and(|f| f.kind != ResponseFormatType::Text);
        if must_call.is_some() && (constrained || request.grammar.is_some()) {
            let message = "tool_choice demands a call, which cannot also have a response_format or \
                           match a grammar";
            return Err(ApiError::new(ErrorCode::InvalidValue, message).at("tool_choice"));
        }
        let must_call = must_call.map(|(tools, parallel)| ToolGrammar {
            format: model.tool_format,
            tools,
            parallel,
        });
        let names = tools.iter().map(|t| t.function.name.clone()).collect();
        Ok(Some(Offer { names, parallel, must_call }))
    }

    /// Special tokens that mark calls: they belong to the text here.
    pub fn visible_specials(&self, model: &Model) -> Vec<TokenId> {
        model.tool_format.visible_specials(&model.tokenizer)
    }

    /// Reads the calls of one choice. Ids of calls follow from request and choice.
    pub fn calls(&self, model: &Model, request: RequestId, choice: u32) -> Calls {
        let key = format!("{request}:{choice}");
        let parser = ToolParser::new(model.tool_format, self.names.clone(), key.as_bytes());
        Calls { parser, parallel: self.parallel }
    }
}

/// Name and schema of the arguments.
fn schema(tool: &Tool) -> (String, serde_json::Value) {
    let none = || json!({"type": "object", "properties": {}, "additionalProperties": false});
    let function = &tool.function;
    (function.name.clone(), function.parameters.clone().unwrap_or_else(none))
}

/// The calls of one choice.
pub(crate) struct Calls {
    parser: ToolParser,
    parallel: bool,
}

impl Calls {
    /// True once a call has begun.
    pub fn any(&self) -> bool {
        self.parser.calls() > 0
    }

    /// What a piece of text adds; `last` when none follows.
    pub fn push(&mut self, text: &str, last: bool) -> Delta {
        let mut events = self.parser.push(text);
        if last {
            events.extend(self.parser.finish());
        }
        let mut delta = Delta::default();
        for event in events {
            match event {
                ToolEvent::Content(text) => {
                    delta.content.get_or_insert_default().push_str(&text);
                }
                // A model that was asked for one call at a time and makes more is cut to the first.
                ToolEvent::Start { index, .. } | ToolEvent::Arguments { index, .. }
                    if index > 0 && !self.parallel => {}
                ToolEvent::Start { index, id, name } => {
                    let arguments = Some(String::new());
                    let function = FunctionDelta { name: Some(name), arguments };
                    let kind = Some(ToolType::Function);
                    let start = ToolCallDelta { index, id: Some(id), kind, function };
                    delta.tool_calls.get_or_insert_default().push(start);
                }
                ToolEvent::Arguments { index, delta: text } => {
                    append(delta.tool_calls.get_or_insert_default(), index, &text);
                }
            }
        }
        delta
    }
}

/// Adds to the piece of this call, if the delta has one already.
fn append(calls: &mut Vec<ToolCallDelta>, index: u32, text: &str) {
    match calls.last_mut().filter(|call| call.index == index) {
        Some(call) => call.function.arguments.get_or_insert_default().push_str(text),
        None => {
            let function = FunctionDelta { name: None, arguments: Some(text.to_owned()) };
            calls.push(ToolCallDelta { index, id: None, kind: None, function });
        }
    }
}
