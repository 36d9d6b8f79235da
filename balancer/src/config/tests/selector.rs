//! Label selectors.

use std::collections::BTreeMap;

use kube::core::SelectorExt as _;

use super::*;

fn canonical(text: &str) -> String {
    selector(text)
        .unwrap_or_else(|error| panic!("`{text}`: {error}"))
        .to_string()
}

#[test]
fn every_kind_of_requirement() {
    for (text, expected) in [
        ("app", "app"),
        ("!app", "!app"),
        ("! app", "!app"),
        ("app=oap", "app=oap"),
        ("app==oap", "app=oap"),
        ("app != oap", "app!=oap"),
        ("app in (b,a)", "app in (a,b)"),
        ("app in(a)", "app in (a)"),
        ("app notin ( a , b )", "app notin (a,b)"),
        (" a=b ,\tc\n,!d ", "a=b,c,!d"),
        (
            "example.org/app.kind_1=A-b.c_D",
            "example.org/app.kind_1=A-b.c_D",
        ),
        // An empty value is a value.
        ("app=", "app="),
        ("app=,b", "app=,b"),
        ("app!=", "app!="),
        ("app in (a,)", "app in (,a)"),
        ("app in (,)", "app in ()"),
        // Words that are operators elsewhere.
        ("in in (in,notin)", "in in (in,notin)"),
        ("notin=in", "notin=in"),
        ("in", "in"),
    ] {
        assert_eq!(canonical(text), expected, "{text}");
    }
    let longest = format!("{}/{}={}", "a".repeat(253), "b".repeat(63), "c".repeat(63));
    assert_eq!(canonical(&longest), longest);
}

#[test]
fn what_is_not_one() {
    for (text, words) in [
        ("", "it selects everything"),
        (" \t\n", "it selects everything"),
        (",", "no label has the key `,`"),
        (",a", "no label has the key `,`"),
        ("a,", "it ends where a key should be"),
        ("a,,b", "no label has the key `,`"),
        ("!", "it ends where a key should be"),
        ("!!a", "no label has the key `!`"),
        ("!a=b", "`=` where a comma should be"),
        ("=b", "no label has the key `=`"),
        ("a b", "`b` after the key `a`"),
        ("a=b c=d", "`c` where a comma should be"),
        ("a===b", "no label has the value `=`"),
        ("a=!b", "no label has the value `!`"),
        ("a=b=c", "`=` where a comma should be"),
        ("a in", "`in` without a list of values"),
        ("a in b", "`in` without a list of values"),
        ("a notin ()", "`notin ()` has no values"),
        ("a in (b", "a parenthesis that is not closed"),
        ("a in (b c)", "`c` where a comma should be"),
        ("a in (b))", "`)` where a comma should be"),
        ("a in ((b))", "`b` where a comma should be"),
        ("a>1", "`>` is not supported"),
        ("a < 1", "`<` is not supported"),
        ("a=b || c=d", "`||` where a comma should be"),
        ("a='b'", "no label has the value `'b'`"),
        ("-a", "no label has the key `-a`"),
        ("a_", "no label has the key `a_`"),
        ("/a", "no label has the key `/a`"),
        ("a/", "no label has the key `a/`"),
        ("a/b/c", "no label has the key `a/b/c`"),
        ("A.b/c", "no label has the key `A.b/c`"),
        ("a..b/c", "no label has the key `a..b/c`"),
        ("a-/c", "no label has the key `a-/c`"),
        ("a=-b", "no label has the value `-b`"),
        ("a=ä", "no label has the value `ä`"),
        ("a\u{a0}=b", "no label has the key"),
    ] {
        let error = selector(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    for long in [
        format!("{}=b", "a".repeat(64)),
        format!("a={}", "b".repeat(64)),
        format!("{}/b", "a".repeat(254)),
    ] {
        let error = selector(&long).expect_err(&long).to_string();
        assert!(error.len() < 150, "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_text_makes_it_panic(text in "[ab!=,() <>/\\-in\tnotin\\PC]{0,30}") {
        let _ = selector(&text);
    }

    #[test]
    fn what_it_reads_it_reads_again(text in "(!?[a-c]|[a-c] ?(=|==|!=) ?[a-c]?|[a-c] (in|notin) ?\\([a-c](, ?[a-c]?){0,2}\\))( ?, ?[a-c]=[a-c]){0,2}") {
        let parsed = selector(&text).unwrap();
        prop_assert_eq!(selector(&parsed.to_string()).unwrap(), parsed);
    }

    #[test]
    fn a_set_is_the_choice_of_its_values(label in proptest::option::of("[a-c]"), values in proptest::collection::vec("[a-c]", 1..4)) {
        let labels: BTreeMap<_, _> = label.clone().map(|value| ("k".to_owned(), value)).into_iter().collect();
        let set = values.join(",");
        let inside = label.is_some_and(|value| values.contains(&value));
        prop_assert_eq!(selector(&format!("k in ({set})")).unwrap().matches(&labels), inside);
        prop_assert_eq!(selector(&format!("k notin ({set})")).unwrap().matches(&labels), !inside);
    }
}
