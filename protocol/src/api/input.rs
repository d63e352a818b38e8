//! Fields that take one thing or many.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{ApiError, INPUTS_MAX, STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};
use crate::TokenId;

/// One stop string or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Stop {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Stop::One(s) => vec![s],
            Stop::Many(v) => v,
        }
    }

    pub(super) fn validate(&self) -> Result<(), ApiError> {
        let strings = match self {
            Stop::One(s) => std::slice::from_ref(s),
            Stop::Many(v) => v,
        };
        let fits = |s: &String| (1..=STOP_STRING_BYTES_MAX).contains(&s.len());
        if strings.len() > STOP_STRINGS_MAX || !strings.iter().all(fits) {
            return Err(ApiError::value(
                "stop",
                format_args!(
                    "at most {STOP_STRINGS_MAX} strings of 1 to {STOP_STRING_BYTES_MAX} bytes"
                ),
            ));
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Stop, E> {
                Ok(Stop::One(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Stop, A::Error> {
                let mut many = Vec::new();
                while let Some(s) = seq.next_element()? {
                    many.push(s);
                }
                Ok(Stop::Many(many))
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}

/// One text or several, as strings or as tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Input {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<TokenId>),
    TokenLists(Vec<Vec<TokenId>>),
}

impl Input {
    /// Number of texts.
    pub fn len(&self) -> usize {
        match self {
            Input::Text(_) | Input::Tokens(_) => 1,
            Input::Texts(v) => v.len(),
            Input::TokenLists(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Refuses no text at all, too many, and texts without content where `allow_blank` is false.
    pub(super) fn validate(&self, param: &str, allow_blank: bool) -> Result<(), ApiError> {
        if !(1..=INPUTS_MAX).contains(&self.len()) {
            return Err(ApiError::value(param, format_args!("1 to {INPUTS_MAX} texts")));
        }
        let blank = match self {
            Input::Text(s) => s.is_empty(),
            Input::Texts(v) => v.iter().any(String::is_empty),
            Input::Tokens(v) => v.is_empty(),
            Input::TokenLists(v) => v.iter().any(Vec::is_empty),
        };
        if blank && !allow_blank {
            return Err(ApiError::value(param, "texts that are not empty"));
        }
        Ok(())
    }
}

/// An element of an input array, before it is known which kind of array it is.
enum Element {
    Text(String),
    Token(TokenId),
    Tokens(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;

        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Element, E> {
                Ok(Element::Text(v.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Element, E> {
                let token = TokenId::try_from(v).map_err(|_| E::custom("token id too large"))?;
                Ok(Element::Token(token))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }

        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputVisitor;

        impl<'de> Visitor<'de> for InputVisitor {
            type Value = Input;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string, an array of strings, an array of token ids or an array of those",
                )
            }

            fn visit_str<E: de::Error>(self, v: &str) -> Result<Input, E> {
                Ok(Input::Text(v.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input, A::Error> {
                let mut input = match seq.next_element()? {
                    None => return Ok(Input::Texts(Vec::new())),
                    Some(Element::Text(s)) => Input::Texts(vec![s]),
                    Some(Element::Token(t)) => Input::Tokens(vec![t]),
                    Some(Element::Tokens(v)) => Input::TokenLists(vec![v]),
                };
                while let Some(element) = seq.next_element()? {
                    match (&mut input, element) {
                        (Input::Texts(v), Element::Text(s)) => v.push(s),
                        (Input::Tokens(v), Element::Token(t)) => v.push(t),
                        (Input::TokenLists(v), Element::Tokens(t)) => v.push(t),
                        _ => return Err(de::Error::custom("elements must be of one kind")),
                    }
                }
                Ok(input)
            }
        }

        deserializer.deserialize_any(InputVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_takes_four_shapes() {
        for (json, expect) in [
            (r#""a""#, Some(Input::Text("a".into()))),
            (r#"["a","b"]"#, Some(Input::Texts(vec!["a".into(), "b".into()]))),
            (r#"[1,2]"#, Some(Input::Tokens(vec![1, 2]))),
            (r#"[[1],[2,3]]"#, Some(Input::TokenLists(vec![vec![1], vec![2, 3]]))),
            (r#"[]"#, Some(Input::Texts(vec![]))),
            (r#"[1,"a"]"#, None),
            (r#"[-1]"#, None),
            (r#"[4294967296]"#, None),
            (r#"{"a":1}"#, None),
            (r#"1"#, None),
        ] {
            assert_eq!(serde_json::from_str::<Input>(json).ok(), expect, "{json}");
        }
    }

    #[test]
    fn stop_takes_one_or_many() {
        for (json, expect) in [
            (r#""x""#, Some(vec!["x"])),
            (r#"["x","y"]"#, Some(vec!["x", "y"])),
            (r#"[1]"#, None),
            (r#"7"#, None),
        ] {
            let got = serde_json::from_str::<Stop>(json).ok().map(Stop::into_vec);
            assert_eq!(got, expect.map(|v| v.into_iter().map(String::from).collect()), "{json}");
        }
        assert!(Stop::One(String::new()).validate().is_err());
        assert!(Stop::Many(vec!["x".into(); STOP_STRINGS_MAX + 1]).validate().is_err());
    }
}
