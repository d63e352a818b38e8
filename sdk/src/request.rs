//! Requests, as builders of their JSON.
//!
//! Fields that most callers need have a method; any other one goes in with [`Request::set`]. Nothing is
//! checked here: a node refuses by name what it does not serve.

use std::marker::PhantomData;

use protocol::api::{Content, Input, Message, ResponseFormat, Role, Tool, ToolChoice};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// A request for an answer of kind `K`: [`Chat`] or [`Completion`].
#[derive(Clone, Debug, PartialEq)]
pub struct Request<K> {
    fields: Map<String, Value>,
    kind: PhantomData<fn() -> K>,
}

/// Messages in, a message out: `/v1/chat/completions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chat {}

/// Text in, text out: `/v1/completions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {}

impl<K> Request<K> {
    fn with(model: &str) -> Self {
        let request = Request { fields: Map::new(), kind: PhantomData };
        request.set("model", model)
    }

    /// Any field of the API, also one that this crate does not know. What is no JSON (a map whose keys
    /// are no strings, a number that is not finite) becomes `null`, which counts as absent.
    pub fn set(mut self, field: &str, value: impl Serialize) -> Self {
        let value = serde_json::to_value(value).unwrap_or(Value::Null);
        self.fields.insert(field.to_owned(), value);
        self
    }

    /// Most tokens of each choice.
    pub fn max_tokens(self, tokens: u32) -> Self {
        self.set("max_tokens", tokens)
    }

    /// 0 is greedy; the node takes 1 where nothing is said.
    pub fn temperature(self, temperature: f32) -> Self {
        self.set("temperature", temperature)
    }

    pub fn top_p(self, share: f32) -> Self {
        self.set("top_p", share)
    }

    pub fn top_k(self, tokens: u32) -> Self {
        self.set("top_k", tokens)
    }

    /// The same seed, request and model give the same answer.
    pub fn seed(self, seed: i64) -> Self {
        self.set("seed", seed)
    }

    /// The answer ends before one of these.
    pub fn stop<S: AsRef<str>>(self, strings: impl IntoIterator<Item = S>) -> Self {
        let strings: Vec<String> = strings.into_iter().map(|s| s.as_ref().to_owned()).collect();
        self.set("stop", strings)
    }

    /// Choices to generate.
    pub fn choices(self, n: u32) -> Self {
        self.set("n", n)
    }

    /// The body, for a streamed answer. Usage comes at its end unless the request says otherwise.
    pub(crate) fn body(&self) -> Vec<u8> {
        let mut fields = self.fields.clone();
        fields.insert("stream".to_owned(), true.into());
        fields.entry("stream_options").or_insert(json!({"include_usage": true}));
        Value::Object(fields).to_string().into_bytes()
    }
}

impl Request<Chat> {
    /// A chat with a model, without messages yet.
    pub fn chat(model: &str) -> Self {
        Request::with(model).set("messages", Vec::<Value>::new())
    }

    pub fn system(self, text: &str) -> Self {
        self.say(Role::System, text)
    }

    pub fn user(self, text: &str) -> Self {
        self.say(Role::User, text)
    }

    /// What the model answered before.
    pub fn assistant(self, text: &str) -> Self {
        self.say(Role::Assistant, text)
    }

    /// Any message.
    pub fn message(mut self, message: Message) -> Self {
        let message = serde_json::to_value(message).unwrap_or(Value::Null);
        match self.fields.get_mut("messages") {
            Some(Value::Array(messages)) => messages.push(message),
            _ => {
                self.fields.insert("messages".to_owned(), Value::Array(vec![message]));
            }
        }
        self
    }

    fn say(self, role: Role, text: &str) -> Self {
        let content = Some(Content::Text(text.to_owned()));
        self.message(Message {
            role,
            content,
            name: None,
            tool_calls: None,
            reasoning_content: None,
            tool_call_id: None,
        })
    }

    /// What the answer must look like.
    pub fn response_format(self, format: ResponseFormat) -> Self {
        self.set("response_format", format)
    }

    /// What the model may call.
    pub fn tools(self, tools: &[Tool]) -> Self {
        self.set("tools", tools)
    }

    pub fn tool_choice(self, choice: ToolChoice) -> Self {
        self.set("tool_choice", choice)
    }
}

impl Request<Completion> {
    /// A text that goes on.
    pub fn completion(model: &str, prompt: &str) -> Self {
        Request::with(model).set("prompt", prompt)
    }

    /// Several prompts, or tokens.
    pub fn prompts(self, prompts: Input) -> Self {
        self.set("prompt", prompts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::api::{ChatRequest, CompletionRequest};

    #[test]
    fn bodies_are_what_nodes_read() {
        let request = Request::chat("m")
            .system("be brief")
            .user("hi")
            .max_tokens(7)
            .temperature(0.0)
            .stop(["a", "b"])
            .seed(-1)
            .choices(2)
            .set("priority", 3)
            .set("broken", f32::NAN);
        let read: ChatRequest = serde_json::from_slice(&request.body()).unwrap();
        assert_eq!(read.validate(), Ok(()));
        assert_eq!((read.messages.len(), read.messages[0].role), (2, Role::System));
        assert_eq!((read.max_tokens, read.seed, read.priority), (Some(7), Some(-1), Some(3)));
        assert_eq!((read.n, read.stream), (Some(2), Some(true)));
        assert_eq!(read.stream_options.unwrap().include_usage, Some(true));

        let request = Request::completion("m", "once").set("stream_options", json!({})).top_p(0.5);
        let read: CompletionRequest = serde_json::from_slice(&request.body()).unwrap();
        assert_eq!(read.validate(), Ok(()));
        assert_eq!(read.stream_options.unwrap().include_usage, None);
        // A field that was set to something else is what was set last.
        let odd = Request::chat("m").set("messages", "none").user("hi");
        let read: ChatRequest = serde_json::from_slice(&odd.body()).unwrap();
        assert_eq!(read.messages.len(), 1);
    }
}
