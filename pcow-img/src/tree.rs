// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Draws trees the way layers lie on each other: the tip on top, branches beside the trunk.
//!
//! ```text
//! ● active
//! │ ○ 3 other
//! ├─╯
//! ○ 2 second
//! ○ 1 first
//! ```
//!
//! Knows texts and parents only. No recursion: a chain may have thousands of nodes.

use std::collections::HashSet;

/// Branches of branches are indented up to here.
const MAX_INDENT: usize = 24;

/// A line of the drawing.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it stands on.
    pub parent: Option<usize>,
    /// The left part of its line, with its mark.
    pub label: String,
    /// The right part, aligned with the others.
    pub details: String,
}

/// The lines of the drawing; the branch that ends in `tip` is the trunk. Nodes in a loop are on no tree and left out.
pub fn draw(nodes: &[Node], tip: usize) -> Vec<String> {
    let lines = Drawing::new(nodes, tip).lines();
    let width = lines.iter().map(|(left, _)| left.chars().count()).max();
    let width = width.unwrap_or(0);
    let join = |(left, right): &(String, &str)| format!("{left:width$}  {right}");
    let lines = lines.iter().map(join);
    lines.map(|l| l.trim_end().to_owned()).collect()
}

struct Drawing<'a> {
    nodes: &'a [Node],
    children: Vec<Vec<usize>>,
    trunk: HashSet<usize>,
}

/// What is still to be drawn.
enum Item {
    /// Everything that stands on this node, and the node itself.
    Tree(usize, String),
    /// The node's line.
    Node(usize, String),
    /// The line in which a branch joins its trunk.
    Join(String),
}

impl<'a> Drawing<'a> {
    fn new(nodes: &'a [Node], tip: usize) -> Self {
        let mut children = vec![Vec::new(); nodes.len()];
        for (index, node) in nodes.iter().enumerate() {
            if let Some(parent) = node.parent {
                children[parent].push(index);
            }
        }
        let trunk = std::iter::successors(Some(tip), |n| nodes[*n].parent);
        let trunk = trunk.take(nodes.len()).collect();
        Self {
            nodes,
            children,
            trunk,
        }
    }

    fn lines(&self) -> Vec<(String, &'a str)> {
        let mut lines = Vec::new();
        let mut stack = self.roots();
        while let Some(item) = stack.pop() {
            match item {
                Item::Tree(root, prefix) => self.push_tree(root, &prefix, &mut stack),
                Item::Join(prefix) => lines.push((format!("{prefix}├─╯"), "")),
                Item::Node(index, prefix) => {
                    let node = &self.nodes[index];
                    lines.push((format!("{prefix}{}", node.label), node.details.as_str()));
                }
            }
        }
        lines
    }

    /// The trees, that of the trunk on top of the stack.
    fn roots(&self) -> Vec<Item> {
        let mut roots: Vec<_> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].parent.is_none())
            .collect();
        roots.sort_by_key(|n| self.trunk.contains(n));
        let tree = |n| Item::Tree(n, String::new());
        roots.into_iter().map(tree).collect()
    }

    /// Takes a tree apart into its main branch and the trees beside it; what is drawn last is pushed first.
    fn push_tree(&self, root: usize, prefix: &str, stack: &mut Vec<Item>) {
        let mut next = Some(root);
        while let Some(node) = next {
            let main = self.main_child(node);
            stack.push(Item::Node(node, prefix.to_owned()));
            for child in self.children[node].iter().filter(|c| Some(**c) != main) {
                stack.push(Item::Join(prefix.to_owned()));
                stack.push(Item::Tree(*child, indented(prefix)));
            }
            next = main;
        }
    }

    fn main_child(&self, node: usize) -> Option<usize> {
        let children = &self.children[node];
        let in_trunk = children.iter().find(|c| self.trunk.contains(c));
        in_trunk.or(children.last()).copied()
    }
}

fn indented(prefix: &str) -> String {
    if prefix.chars().count() >= MAX_INDENT {
        return prefix.to_owned();
    }
    format!("{prefix}│ ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(parents: &[Option<usize>]) -> Vec<Node> {
        let node = |(index, parent): (usize, &Option<usize>)| Node {
            parent: *parent,
            label: index.to_string(),
            details: String::new(),
        };
        parents.iter().enumerate().map(node).collect()
    }

    #[test]
    fn branches_stand_beside_the_trunk_above_the_node_that_they_leave() {
        // 0 ← 1 ← 2 ← 3 is the trunk; 4 and 5 ← 6 leave it at 1, 7 leaves 5.
        let parents = [
            None,
            Some(0),
            Some(1),
            Some(2),
            Some(1),
            Some(1),
            Some(5),
            Some(5),
        ];
        let drawn = draw(&tree(&parents), 3);
        let expected = [
            "3",
            "2",
            "│ 7",
            "│ │ 6",
            "│ ├─╯",
            "│ 5",
            "├─╯",
            "│ 4",
            "├─╯",
            "1",
            "0",
        ];
        assert_eq!(drawn, expected);
    }

    #[test]
    fn the_tree_of_the_trunk_comes_first_and_loops_are_left_out() {
        let drawn = draw(&tree(&[None, None, Some(3), Some(2)]), 1);
        assert_eq!(drawn, ["1", "0"]);
    }

    #[test]
    fn a_comb_of_branches_is_drawn_with_bounded_indentation() {
        // Every node has a leaf beside the next one: 2i+1 and 2i+2 on 2i, and the main child is the leaf.
        let parents: Vec<_> = (0..8001_usize)
            .map(|n| n.checked_sub(1).map(|p| p / 2 * 2))
            .map(|p| p.map(|p| if p == 0 { 0 } else { p - 1 }))
            .collect();
        let drawn = draw(&tree(&parents), 0);
        assert!(drawn.len() >= parents.len());
        let widest = drawn.iter().map(|l| l.chars().count()).max().unwrap();
        assert!(widest < MAX_INDENT + 10, "{widest}");
    }
}
