//! YAML with the place of every value.
//!
//! A tree of values, built from the events of the YAML parser. A value that is well-formed but
//! wrong is so reported with its place, just as a syntax error is. Scalars keep their spelling:
//! what `no`, `0x10` or `1_000` means is for the reader of the value to say. An alias shares the
//! node that it names, so aliases that double each other take no more memory than their text.

use std::{collections::HashMap, net::Ipv6Addr, rc::Rc};

use granit_parser::{Event, Marker, Parser, ScalarStyle, StrInput};

use super::error::{Place, Result};
use crate::sanitize;

/// More nested than any setting is; a deeper file is a mistake or an attack.
const MAX_DEPTH: usize = 16;

/// A value and its place; for an alias this is the place of the alias.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Rc<Value>,
}

/// What a value can be.
#[derive(Debug)]
pub(super) enum Value {
    /// An empty value, `~` or `null`.
    Null,
    /// Anything else that is neither a list nor a mapping, as it was spelled.
    Scalar(String),
    /// `[a, b]` or `- a` lines.
    List(Vec<Node>),
    /// `key: value` pairs; no key comes twice.
    Map(Vec<Entry>),
}

/// One `key: value` pair.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) place: Place,
    pub(super) node: Node,
}

impl Value {
    /// The kind of value in words, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "empty",
            Self::Scalar(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// Parses `text`, which must hold exactly one document. `None` when it holds only comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>> {
    let options = granit_parser::options! { disallow_directives: true, emit_comments: false };
    let mut builder = Builder {
        text,
        events: Parser::new_from_str_with_options(text, options),
        // A carriage return alone ends a line too.
        last_line: text
            .replace("\r\n", "\n")
            .replace('\r', "\n")
            .lines()
            .count()
            .max(1),
        anchors: HashMap::new(),
    };
    let mut root = None;
    loop {
        match builder.next()? {
            (Event::StreamEnd, _) => return Ok(root),
            (Event::DocumentStart(..), place) if root.is_some() => {
                return place.fail(
                    "a second YAML document starts here; keep one document: remove the `---` line and what follows, or merge the two",
                );
            }
            (Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd, _) => {}
            (event, place) => root = Some(builder.node(event, place, 0)?),
        }
    }
}

/// What to write where an address in brackets stands without quotes, which YAML takes for a list.
const QUOTE_IT: &str = "an IPv6 address with a port needs quotes; write \"[::1]:21801\"";

struct Builder<'input> {
    text: &'input str,
    events: Parser<'input, StrInput<'input>>,
    last_line: usize,
    anchors: HashMap<usize, Node>,
}

impl<'input> Builder<'input> {
    /// The next event and its place.
    fn next(&mut self) -> Result<(Event<'input>, Place)> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok((event, self.place(&span.start))),
            Some(Err(error)) if self.follows_bare_ipv6(error.marker()) => self
                .place(error.marker())
                .fail(format!("this is not valid YAML: {QUOTE_IT}")),
            Some(Err(error)) => self.place(error.marker()).fail(format!(
                "this is not valid YAML: {}; correct the syntax here or on a line next to it (indentation, tabs, quotes, brackets)",
                error.info()
            )),
            // The parser ends with StreamEnd, after which nobody asks.
            None => Ok((Event::StreamEnd, Place { line: self.last_line, column: 1 })),
        }
    }

    /// Whether an IPv6 address in brackets ends right before.
    fn follows_bare_ipv6(&self, marker: &Marker) -> bool {
        let line = self.text.lines().nth(marker.line().saturating_sub(1));
        let before: String = line.unwrap_or("").chars().take(marker.col()).collect();
        let inside = before
            .strip_suffix(']')
            .and_then(|rest| rest.rsplit_once('['));
        inside.is_some_and(|(_, address)| is_ipv6(address))
    }

    /// The parser may place what is absent, a value or the end, behind the last line.
    fn place(&self, marker: &Marker) -> Place {
        Place {
            line: marker.line().min(self.last_line),
            column: marker.col() + 1,
        }
    }

    fn node(&mut self, event: Event<'input>, place: Place, depth: usize) -> Result<Node> {
        if depth > MAX_DEPTH {
            return place.fail(format!(
                "lists and mappings are nested more than {MAX_DEPTH} deep; no setting needs that: look for a stray indentation or bracket"
            ));
        }
        if let Some(tag) = event.tag() {
            let tag = shown(&tag.to_string());
            return place.fail(format!("the YAML tag {tag} is not understood; remove it"));
        }
        let (anchor, value) = match event {
            Event::Alias(anchor) => return self.alias(anchor, place),
            Event::Scalar(text, style, anchor, _) => (anchor, scalar(&text, style)),
            Event::SequenceStart(_, anchor, _) => (anchor, self.list(depth)?),
            Event::MappingStart(_, anchor, _) => (anchor, self.map(depth)?),
            other => {
                return place.fail(format!(
                    "unexpected YAML ({other:?}); write plain settings here"
                ));
            }
        };
        let node = Node {
            place,
            value: Rc::new(value),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&self, anchor: usize, place: Place) -> Result<Node> {
        match self.anchors.get(&anchor) {
            Some(named) => Ok(Node {
                place,
                value: Rc::clone(&named.value),
            }),
            None => place.fail(
                "this alias stands inside the value that it names; write the value out instead",
            ),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, place) => items.push(self.node(event, place, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Value> {
        let mut entries = Vec::new();
        let mut lines = HashMap::new();
        loop {
            let (event, place) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                return Ok(Value::Map(entries));
            }
            let key = match &*self.node(event, place, depth + 1)?.value {
                Value::Scalar(key) => key.clone(),
                Value::List(items) if items.iter().any(Node::is_ipv6) => {
                    return place.fail(QUOTE_IT);
                }
                other => {
                    let kind = other.kind();
                    return place.fail(format!(
                        "a key is a word, this one is {kind}; write `key: value`"
                    ));
                }
            };
            if let Some(first) = lines.insert(key.clone(), place.line) {
                let key = shown(&key);
                return place.fail(format!(
                    "`{key}` is given twice, first on line {first}; keep one of the two"
                ));
            }
            let (event, value_place) = self.next()?;
            let mut node = self.node(event, value_place, depth + 1)?;
            if matches!(*node.value, Value::Null) {
                // The parser may place an absent value on another line, where the next token is.
                node.place = place;
            }
            entries.push(Entry { key, place, node });
        }
    }
}

fn is_ipv6(text: &str) -> bool {
    text.parse::<Ipv6Addr>().is_ok()
}

impl Node {
    fn is_ipv6(&self) -> bool {
        matches!(&*self.value, Value::Scalar(text) if is_ipv6(text))
    }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    let null = style == ScalarStyle::Plain && matches!(text, "" | "~" | "null" | "Null" | "NULL");
    if null {
        Value::Null
    } else {
        Value::Scalar(text.to_owned())
    }
}

/// `text` as it may stand in a message, not longer than a line of an error should be.
pub(super) fn shown(text: &str) -> String {
    sanitize::for_message(text, 60)
}
