//! Pieces of answers, and answers put together from them.

use protocol::api::{
    CalledFunction, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs,
    ChatMessageOut, Completion, CompletionChoice, CompletionLogprobs, FinishReason, Role, ToolCall,
    ToolCallDelta, ToolType, Usage,
};
use serde::de::DeserializeOwned;

/// A piece of a streamed answer: [`ChatChunk`] or [`Completion`].
pub trait Chunk: DeserializeOwned + Send + Sync + Unpin + sealed::Whole + 'static {
    /// What it adds to the text of a choice; empty if nothing.
    fn text(&self, choice: u32) -> &str;
    /// Why the choice ended, in its last piece.
    fn finish_reason(&self, choice: u32) -> Option<FinishReason>;
    /// Tokens counted, in the last piece of all.
    fn usage(&self) -> Option<&Usage>;
}

pub(crate) mod sealed {
    /// How pieces become a whole.
    pub trait Whole: Sized {
        /// An answer that is not complete.
        type Open: Send;
        type Answer: Send;
        /// Where pieces come from.
        const PATH: &'static str;
        /// Adds the next piece.
        fn join(open: Option<Self::Open>, piece: Self) -> Result<Self::Open, &'static str>;
        /// After the last piece.
        fn close(open: Self::Open) -> Result<Self::Answer, &'static str>;
    }
}

impl Chunk for ChatChunk {
    fn text(&self, choice: u32) -> &str {
        let choice = self.choices.iter().find(|c| c.index == choice);
        choice.and_then(|c| c.delta.content.as_deref()).unwrap_or_default()
    }

    fn finish_reason(&self, choice: u32) -> Option<FinishReason> {
        self.choices.iter().find(|c| c.index == choice)?.finish_reason
    }

    fn usage(&self) -> Option<&Usage> {
        self.usage.as_ref()
    }
}

impl Chunk for Completion {
    fn text(&self, choice: u32) -> &str {
        let choice = self.choices.iter().find(|c| c.index == choice);
        choice.map(|c| c.text.as_str()).unwrap_or_default()
    }

    fn finish_reason(&self, choice: u32) -> Option<FinishReason> {
        self.choices.iter().find(|c| c.index == choice)?.finish_reason
    }

    fn usage(&self) -> Option<&Usage> {
        self.usage.as_ref()
    }
}

/// A chat whose choices may not have ended yet.
pub struct OpenChat {
    answer: ChatCompletion,
    ended: Vec<bool>,
}

impl sealed::Whole for ChatChunk {
    type Open = OpenChat;
    type Answer = ChatCompletion;
    const PATH: &'static str = "/v1/chat/completions";

    fn join(open: Option<OpenChat>, piece: ChatChunk) -> Result<OpenChat, &'static str> {
        let ChatChunk { id, created, model, system_fingerprint, choices, usage, .. } = piece;
        let mut open = open.unwrap_or_else(|| {
            let object = "chat.completion".to_owned();
            let (choices, usage) = (Vec::new(), Usage::default());
            let answer =
                ChatCompletion { id, object, created, model, choices, usage, system_fingerprint };
            OpenChat { answer, ended: Vec::new() }
        });
        for piece in choices {
            let index = piece.index as usize;
            if index >= CHOICES_MAX {
                return Err("a choice with a large index");
            }
            for missing in open.answer.choices.len()..=index {
                open.answer.choices.push(empty_choice(missing as u32));
                open.ended.push(false);
            }
            open.ended[index] |= piece.finish_reason.is_some();
            append(&mut open.answer.choices[index], piece);
        }
        if let Some(usage) = usage {
            open.answer.usage = usage;
        }
        Ok(open)
    }

    fn close(mut open: OpenChat) -> Result<ChatCompletion, &'static str> {
        if open.ended.contains(&false) {
            return Err("a choice without an end");
        }
        for message in open.answer.choices.iter_mut().map(|choice| &mut choice.message) {
            // As in an answer that is not streamed: null where there are nothing but calls.
            let calls = message.tool_calls.is_some();
            message.content = message.content.take().filter(|text| !(calls && text.is_empty()));
            if !calls {
                message.content.get_or_insert_default();
            }
        }
        Ok(open.answer)
    }
}

fn empty_choice(index: u32) -> ChatChoice {
    let role = Role::Assistant;
    let message = ChatMessageOut { role, content: None, refusal: None, tool_calls: None };
    ChatChoice { index, message, logprobs: None, finish_reason: FinishReason::Stop }
}

fn append(choice: &mut ChatChoice, piece: ChatChunkChoice) {
    if let Some(text) = piece.delta.content {
        choice.message.content.get_or_insert_default().push_str(&text);
    }
    for delta in piece.delta.tool_calls.into_iter().flatten() {
        append_call(choice.message.tool_calls.get_or_insert_default(), delta);
    }
    if let Some(ChatLogprobs { content, .. }) = piece.logprobs {
        choice.logprobs.get_or_insert_default().content.extend(content);
    }
    if let Some(reason) = piece.finish_reason {
        choice.finish_reason = reason;
    }
}

fn append_call(calls: &mut Vec<ToolCall>, delta: ToolCallDelta) {
    if let (Some(id), Some(name)) = (delta.id, delta.function.name) {
        let function = CalledFunction { name, arguments: String::new() };
        calls.push(ToolCall { id, kind: ToolType::Function, function });
    }
    let call = calls.get_mut(delta.index as usize);
    if let (Some(call), Some(text)) = (call, delta.function.arguments) {
        call.function.arguments.push_str(&text);
    }
}

impl sealed::Whole for Completion {
    type Open = Completion;
    type Answer = Completion;
    const PATH: &'static str = "/v1/completions";

    fn join(answer: Option<Completion>, piece: Completion) -> Result<Completion, &'static str> {
        let Completion { choices, usage, .. } = piece;
        let mut answer = answer.unwrap_or(Completion { choices: Vec::new(), usage: None, ..piece });
        for piece in choices {
            let index = piece.index as usize;
            if index >= CHOICES_MAX {
                return Err("a choice with a large index");
            }
            for missing in answer.choices.len()..=index {
                let (index, text) = (missing as u32, String::new());
                let choice = CompletionChoice { index, text, logprobs: None, finish_reason: None };
                answer.choices.push(choice);
            }
            let choice = &mut answer.choices[index];
            choice.text.push_str(&piece.text);
            choice.finish_reason = piece.finish_reason.or(choice.finish_reason);
            if let Some(new) = piece.logprobs {
                append_columns(choice.logprobs.get_or_insert_default(), new);
            }
        }
        answer.usage = usage.or(answer.usage);
        Ok(answer)
    }

    fn close(answer: Completion) -> Result<Completion, &'static str> {
        match answer.choices.iter().all(|choice| choice.finish_reason.is_some()) {
            true => Ok(answer),
            false => Err("a choice without an end"),
        }
    }
}

fn append_columns(all: &mut CompletionLogprobs, new: CompletionLogprobs) {
    all.tokens.extend(new.tokens);
    all.token_logprobs.extend(new.token_logprobs);
    all.top_logprobs.extend(new.top_logprobs);
    all.text_offset.extend(new.text_offset);
}

/// Choices that one answer may have: as many as a node gives to the prompts of one request.
const CHOICES_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::sealed::Whole;
    use super::*;
    use serde_json::{Value, json};

    fn chat(choices: Value, usage: Value) -> ChatChunk {
        serde_json::from_value(json!({
            "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "system_fingerprint": "f", "choices": choices, "usage": usage,
        }))
        .unwrap()
    }

    fn whole(pieces: Vec<ChatChunk>) -> Result<ChatCompletion, &'static str> {
        let mut answer = None;
        for piece in pieces {
            answer = Some(ChatChunk::join(answer, piece)?);
        }
        ChatChunk::close(answer.unwrap())
    }

    #[test]
    fn a_chat_is_the_sum_of_its_pieces() {
        let begin = |i: u32| json!({"index": i, "delta": {"role": "assistant", "content": ""}});
        let text = |i: u32, t: &str| json!({"index": i, "delta": {"content": t}});
        let end = |i: u32, r: &str| json!({"index": i, "delta": {}, "finish_reason": r});
        let call = |id: Value, name: Value, arguments: &str| {
            json!({"index": 1, "delta": {"tool_calls": [{"index": 0, "id": id,
                "function": {"name": name, "arguments": arguments}}]}})
        };
        let answer = whole(vec![
            chat(json!([begin(0)]), Value::Null),
            chat(json!([begin(1)]), Value::Null),
            chat(json!([text(0, "Hel"), call(json!("call_1"), json!("f"), "")]), Value::Null),
            chat(json!([text(0, "lo"), call(Value::Null, Value::Null, "{}")]), Value::Null),
            chat(json!([end(0, "length"), end(1, "tool_calls")]), Value::Null),
            chat(json!([]), json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})),
        ])
        .unwrap();
        assert_eq!(answer.object, "chat.completion");
        assert_eq!(answer.usage.total_tokens, 3);
        let [a, b] = &answer.choices[..] else { panic!("{answer:?}") };
        assert_eq!(
            (a.message.content.as_deref(), a.finish_reason),
            (Some("Hello"), FinishReason::Length)
        );
        assert_eq!(
            (b.message.content.as_deref(), b.finish_reason),
            (None, FinishReason::ToolCalls)
        );
        let call = &b.message.tool_calls.as_ref().unwrap()[0];
        assert_eq!((call.id.as_str(), call.function.arguments.as_str()), ("call_1", "{}"));
    }

    #[test]
    fn what_is_no_whole_answer() {
        let begin = json!([{"index": 0, "delta": {"role": "assistant"}}]);
        assert!(whole(vec![chat(begin, Value::Null)]).is_err());
        let far = json!([{"index": u32::MAX, "delta": {}}]);
        assert!(whole(vec![chat(far, Value::Null)]).is_err());
    }
}
