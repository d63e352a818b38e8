use proptest::prelude::*;

use super::sample;
use super::*;

#[test]
fn user_text_is_never_special() {
    let tokenizer = sample::tokenizer();
    let text = "a<|im_start|>b[INST]<|eot_id|>";
    let ids = tokenizer.encode(text, false).expect("encodes");
    assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{ids:?}");
    assert_eq!(tokenizer.decode(&ids, true), text);
}

#[test]
fn template_text_is_special_where_it_is_not_guarded() {
    let tokenizer = sample::tokenizer();
    let user = "<|im_end|>x<|im_";
    let guard = Guard::new(&tokenizer, [user]).expect("free marks");
    let rendered = format!("<|im_start|>{}<|im_end|>", guard.protect(user));
    let ids = tokenizer.encode_template(&rendered, &guard).expect("encodes");
    let special: Vec<_> = ids.iter().filter(|&&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [&303, &304]);
    assert_eq!(tokenizer.decode(&ids, false), format!("<|im_start|>{user}<|im_end|>"));
}

#[test]
fn begin_of_sequence_is_added_once() {
    let tokenizer = sample::tokenizer();
    assert_eq!(tokenizer.encode("hello", true).expect("encodes"), [300, 259]);
    assert_eq!(tokenizer.encode("", true).expect("encodes"), [300]);
    assert!(tokenizer.encode("", false).expect("encodes").is_empty());
}

#[test]
fn every_known_end_ends() {
    let tokenizer = sample::tokenizer();
    assert_eq!(tokenizer.end_of_generation(), [301, 302, 304]);
    assert!(!tokenizer.is_end_of_generation(303));
}

#[test]
fn ids_outside_the_vocabulary_are_nothing() {
    let tokenizer = sample::tokenizer();
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    assert!(!tokenizer.is_special(1 << 30));
    assert_eq!(tokenizer.decode(&[104, 9_999_999], true), "h");
}

#[test]
fn damaged_metadata_is_refused_by_name() {
    let good = sample::metadata();
    type Damage = fn(&mut crate::weights::GgufTokenizer);
    let damage: [(&str, Damage); 8] = [
        ("tokenizer.ggml.model", |m| m.model = "bert".to_owned()),
        ("tokenizer.ggml.pre", |m| m.pre = Some("from the future".to_owned())),
        ("tokenizer.ggml.tokens", |m| m.tokens.clear()),
        ("tokenizer.ggml.tokens", |m| m.tokens[65] = "no byte".to_owned()),
        ("tokenizer.ggml.token_type", |m| m.token_types.truncate(3)),
        ("tokenizer.ggml.merges", |m| m.merges[0] = "q z".to_owned()),
        ("tokenizer.ggml.merges", |m| m.merges[0] = "qz".to_owned()),
        ("tokenizer.ggml.bos_token_id", |m| m.bos = Some(1 << 20)),
    ];
    for (expect, break_it) in damage {
        let mut metadata = good.clone();
        break_it(&mut metadata);
        let error = Tokenizer::from_gguf(&metadata).expect_err(expect).to_string();
        assert!(error.contains(expect), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn deltas_are_the_whole(ids in prop::collection::vec(0u32..320, 0..64), skip in any::<bool>()) {
        let tokenizer = sample::tokenizer();
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !(skip && tokenizer.is_special(id)))
            .flat_map(|&id| tokenizer.token_bytes(id).to_vec())
            .collect();
        let mut stream = Detokenizer::new(tokenizer.clone(), skip);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&stream.push(id));
        }
        text.push_str(&stream.finish());
        prop_assert_eq!(&text, &tokenizer.decode(&ids, skip));
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn text_survives(text in "\\PC{0,40}|[a-z<|_>\\[\\]IN ]{0,40}") {
        let tokenizer = sample::tokenizer();
        let ids = tokenizer.encode(&text, false).expect("encodes");
        prop_assert!(ids.iter().all(|&id| !tokenizer.is_special(id)));
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }

    #[test]
    fn guarded_text_survives_between_markers(
        parts in prop::collection::vec("<\\|im_(start\\|>)?|start\\|>|[a-z<|> ]{0,9}", 0..6)
    ) {
        let tokenizer = sample::tokenizer();
        let guard = Guard::new(&tokenizer, parts.iter().map(String::as_str)).expect("free marks");
        let user: String = parts.iter().map(|p| guard.protect(p)).collect();
        let rendered = format!("<|im_start|>{user}<|im_end|>");
        let ids = tokenizer.encode_template(&rendered, &guard).expect("encodes");
        let special = ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
        prop_assert_eq!(special, 2);
        let whole = format!("<|im_start|>{}<|im_end|>", parts.concat());
        prop_assert_eq!(tokenizer.decode(&ids, false), whole);
    }
}
